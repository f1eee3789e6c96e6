"""The contract suites on one CUDA device; `nox -s gpu` runs them.

Tolerances, as the suites measure them: 1e-4 in float32, because kernels there sum in another order for another packing,
and 5e-2 in bfloat16, whose eight bits of precision round every activation.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.models import write_tiny_model
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.faults import FAULTS_PLUGIN
from tinker_core.testing.sampler_bench import GroupBench, SamplerBench
from tinker_core.testing.sampler_contract import SamplerContract
from tinker_core.testing.trainer_contract import TrainerContract
from tinker_core.types import BaseModelSpec

DEVICE = "cpu"
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def start(dtype: str, factory: pytest.TempPathFactory) -> Iterator[BlockingGroup]:
    path = write_tiny_model(factory.mktemp("model"), "qwen3", tie=True)
    spec = WorkerGroupSpec(
        base_model=BaseModelSpec(name="tiny", path=str(path)),
        trainer="fsdp",
        sampler="colocated",
        plugins=("core", "fsdp", FAULTS_PLUGIN),
        num_ranks=1,
        device=DEVICE,
        dtype=dtype,
        micro_batch_tokens=24,
        max_models=5,
        max_context_length=64,
    )
    with start_group(spec) as group:
        yield group


class OnCuda:
    dtype = "float32"

    @pytest.fixture(scope="class")
    def group(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingGroup]:
        yield from start(self.dtype, tmp_path_factory)

    @pytest.fixture(scope="class")
    def bench(self, group: BlockingGroup) -> SamplerBench:
        return GroupBench(group)


class TestTrainerInFloat32(OnCuda, TrainerContract):
    tolerance = TOLERANCES["float32"]


class TestTrainerInBfloat16(OnCuda, TrainerContract):
    dtype = "bfloat16"
    tolerance = TOLERANCES["bfloat16"]


class TestSamplerInFloat32(OnCuda, SamplerContract):
    tolerance = TOLERANCES["float32"]


class TestSamplerInBfloat16(OnCuda, SamplerContract):
    dtype = "bfloat16"
    tolerance = TOLERANCES["bfloat16"]
