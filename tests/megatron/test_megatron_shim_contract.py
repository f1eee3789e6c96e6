"""The trainer contract in worlds that Megatron-Core runs on CPUs only with the shim of `cpu_shim`.

The shim stands for the CUDA device that Megatron-Core names in pipeline and sequence parallelism; what is computed is
the same as on devices, but no test here says anything about NCCL.  `test_pipeline` is for every day.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.megatron.groups import start_megatron
from tinker_core.testing import BlockingGroup
from tinker_core.testing.trainer_contract import TrainerContract

TENSOR, PIPELINE = {"tensor-parallel": 2}, {"pipeline-parallel": 2}
WORLDS = {
    "pipeline": (2, "qwen3", True, PIPELINE),
    "pipeline, untied": (2, "llama", False, PIPELINE),
    "sequence parallel": (2, "llama", False, {**TENSOR, "sequence-parallel": True}),
    "tensor parallel pipeline": (4, "qwen2", False, {**TENSOR, **PIPELINE}),
    "sequence parallel pipeline": (4, "qwen3", True, {**TENSOR, **PIPELINE, "sequence-parallel": True}),
    "data parallel pipeline": (4, "llama", False, PIPELINE),
    "four stages": (4, "qwen2", True, {"pipeline-parallel": 4}),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module", params=WORLDS)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingGroup]:
    num_ranks, kind, tie, options = WORLDS[request.param]
    directory = tmp_path_factory.mktemp("model")
    with start_megatron(directory, kind, num_ranks, options, tie=tie, num_layers=4) as group:
        yield group


class TestMegatronTrainerUnderTheShim(TrainerContract):
    pass
