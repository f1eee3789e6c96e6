"""The sampler contract over the colocated sampler inside Megatron-Core ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.megatron.groups import megatron_spec
from tests.models import write_tiny_model
from tinker_core.testing import start_group
from tinker_core.testing.sampler_bench import GroupBench, SamplerBench
from tinker_core.testing.sampler_contract import SamplerContract

WORLDS = {
    "tensor parallel": (2, "llama", True, {"tensor-parallel": 2}),
    "one rank": (1, "qwen3", True, {}),
    "data parallel": (2, "qwen2", False, {}),
    "context parallel": (2, "llama", False, {"context-parallel": 2}),
    "sequence parallel": (2, "qwen3", False, {"tensor-parallel": 2, "sequence-parallel": True}),
    "expert parallel": (2, "qwen3_moe", False, {"expert-parallel": 2}),
    "tensor and expert parallel": (2, "qwen3_moe", False, {"tensor-parallel": 2, "expert-parallel": 2}),
}


pytestmark = pytest.mark.slow  # every day, the server's tests sample too


@pytest.fixture(scope="module", params=WORLDS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SamplerBench]:
    num_ranks, kind, tie, options = WORLDS[request.param]
    path = write_tiny_model(tmp_path_factory.mktemp("model"), kind, tie=tie)
    spec = megatron_spec(path, num_ranks, options, sampler="colocated", max_context_length=64)
    with start_group(spec) as group:
        yield GroupBench(group)


class TestColocatedSamplerOnMegatron(SamplerContract):
    pass
