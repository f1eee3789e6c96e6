"""The contract suites on one CUDA device; `nox -s gpu` runs them.

Tolerances, as the suites measure them.  float32: 1e-4, because kernels there sum in another order for another packing.
bfloat16, whose eight bits of precision round every activation: 5e-2 for the trainer; for the sampler 0.2, an absolute
difference of logprobs that reach -13.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import pytest

from tests.models import write_tiny_model
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.determinism_contract import DeterminismContract
from tinker_core.testing.faults import FAULTS_PLUGIN
from tinker_core.testing.sampler_bench import GroupBench, SamplerBench
from tinker_core.testing.sampler_contract import SamplerContract
from tinker_core.testing.trainer_contract import TrainerContract
from tinker_core.types import BaseModelSpec

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture(scope="class")
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WorkerGroupSpec:
    path = write_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tie=True)
    return WorkerGroupSpec(
        base_model=BaseModelSpec(name="tiny", path=str(path)),
        trainer="fsdp",
        sampler="colocated",
        plugins=("core", "fsdp", FAULTS_PLUGIN),
        num_ranks=1,
        device=DEVICE,
        dtype=request.cls.dtype,
        micro_batch_tokens=24,
        max_models=5,
        max_context_length=64,
    )


@pytest.fixture(scope="class")
def group(spec: WorkerGroupSpec) -> Iterator[BlockingGroup]:
    with start_group(spec) as group:
        yield group


@pytest.fixture(scope="class")
def groups(spec: WorkerGroupSpec) -> Iterator[tuple[BlockingGroup, BlockingGroup]]:
    deterministic = attrs.evolve(spec, deterministic=True)
    with start_group(deterministic) as one, start_group(deterministic) as two:
        yield one, two


@pytest.fixture(scope="class")
def bench(group: BlockingGroup) -> SamplerBench:
    return GroupBench(group)


class TestTrainerInFloat32(TrainerContract):
    dtype = "float32"
    tolerance = 1e-4


class TestTrainerInBfloat16(TrainerContract):
    dtype = "bfloat16"
    tolerance = 5e-2


class TestSamplerInFloat32(SamplerContract):
    dtype = "float32"
    tolerance = 1e-4


class TestSamplerInBfloat16(SamplerContract):
    dtype = "bfloat16"
    tolerance = 0.2


class TestDeterminismInFloat32(DeterminismContract):
    dtype = "float32"


class TestDeterminismInBfloat16(DeterminismContract):
    dtype = "bfloat16"
