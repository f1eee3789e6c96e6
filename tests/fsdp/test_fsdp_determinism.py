"""Deterministic mode in worker processes; at world size 2 in `nox -s slow`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.models import write_tiny_model
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.determinism_contract import DeterminismContract
from tinker_core.types import BaseModelSpec


def spec(path: Path, num_ranks: int) -> WorkerGroupSpec:
    return WorkerGroupSpec(
        base_model=BaseModelSpec(name="tiny", path=str(path)),
        trainer="fsdp",
        sampler="colocated",
        plugins=("core", "fsdp"),
        num_ranks=num_ranks,
        device="cpu",
        dtype="float32",
        micro_batch_tokens=24,
        max_models=5,
        max_context_length=64,
        deterministic=True,
    )


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def groups(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[BlockingGroup]]:
    path = write_tiny_model(tmp_path_factory.mktemp("model"), "qwen3" if request.param == 1 else "llama", tie=True)
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        contexts = [start_group(spec(path, request.param)) for _ in range(2)]
        starts = [pool.submit(context.__enter__) for context in contexts]
        for context in contexts:
            stack.push(context.__exit__)
        yield [start.result() for start in starts]


class TestDeterministicFsdp(DeterminismContract):
    pass
