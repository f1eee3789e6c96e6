"""The sampler contract over vLLM engines, for tied and untied weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vllm.conftest import vllm_bench
from tinker_core.testing.sampler_bench import SamplerBench
from tinker_core.testing.sampler_contract import SamplerContract


@pytest.fixture(
    scope="module", params=[pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.slow)]
)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SamplerBench]:
    kind = "llama" if request.param else "qwen3"
    with vllm_bench(tmp_path_factory.mktemp("contract"), kind, tie=request.param) as (bench, _, _):
        yield bench


class TestVllmSampler(SamplerContract):
    pass
