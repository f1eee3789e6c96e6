"""Deterministic mode on Megatron-Core, in worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.megatron.groups import megatron_spec
from tests.megatron.worlds import WORLDS
from tests.models import write_tiny_model
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.determinism_contract import DeterminismContract

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["one-rank", "tensor"])
def groups(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[BlockingGroup]]:
    world = WORLDS[request.param]
    path = write_tiny_model(tmp_path_factory.mktemp("model"), "qwen3" if world.num_ranks == 1 else "llama", tie=True)
    spec = megatron_spec(path, world.num_ranks, world.options, deterministic=True, max_context_length=64)
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        contexts = [start_group(spec) for _ in range(2)]
        starts = [pool.submit(context.__enter__) for context in contexts]
        for context in contexts:
            stack.push(context.__exit__)
        yield [start.result() for start in starts]


class TestDeterministicMegatron(DeterminismContract):
    pass
