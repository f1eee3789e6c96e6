"""The sampler contract over the colocated sampler in worker processes, at world size 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.models import write_tiny_model
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import start_group
from tinker_core.testing.sampler_bench import GroupBench, SamplerBench
from tinker_core.testing.sampler_contract import SamplerContract
from tinker_core.types import BaseModelSpec


@pytest.fixture(scope="module", params=[1, 2])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SamplerBench]:
    path = write_tiny_model(tmp_path_factory.mktemp("model"), "llama" if request.param == 1 else "qwen3", tie=True)
    spec = WorkerGroupSpec(
        base_model=BaseModelSpec(name="tiny", path=str(path)),
        trainer="fsdp",
        sampler="colocated",
        plugins=("core", "fsdp"),
        num_ranks=request.param,
        device="cpu",
        dtype="float32",
        micro_batch_tokens=24,
        max_models=5,
        max_context_length=64,
        environment={"OMP_NUM_THREADS": "1"},
    )
    with start_group(spec) as group:
        yield GroupBench(group)


class TestColocatedSampler(SamplerContract):
    pass
