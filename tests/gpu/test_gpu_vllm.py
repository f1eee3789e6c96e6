"""The sampler ``vllm`` on one CUDA device, beside the trainer; `nox -s gpu` runs it.

Tolerances are those of `test_cuda_contracts`, for the same reasons: float32 1e-4, bfloat16 0.2.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.models import Kind
from tinker_core.testing.sampler_bench import SamplerBench
from tinker_core.testing.sampler_contract import SamplerContract

pytestmark = pytest.mark.gpu

MEMORY_SHARE = 0.4
"""Of the device for one engine, so that the trainer has room beside it."""


@pytest.fixture(scope="class")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SamplerBench]:
    from tests.vllm.conftest import vllm_bench

    options = {"device": "cuda", "dtype": request.cls.dtype, "tie": request.cls.tie, "vllm-memory-share": MEMORY_SHARE}
    with vllm_bench(tmp_path_factory.mktemp("contract"), request.cls.kind, **options) as (bench, _, _):
        yield bench


class TestVllmInFloat32(SamplerContract):
    dtype = "float32"
    tolerance = 1e-4
    kind: Kind = "llama"
    tie = True


class TestVllmInBfloat16(SamplerContract):
    dtype = "bfloat16"
    tolerance = 0.2
    kind: Kind = "llama"
    tie = True


class TestVllmWithoutTiedWeights(SamplerContract):
    dtype = "float32"
    tolerance = 1e-4
    kind: Kind = "qwen3"
    tie = False


def test_trainer_and_engine_share_one_device_and_an_engine_that_is_killed_comes_back(tmp_path: Path) -> None:
    import tinker
    from tinker import types

    from tests.e2e.conftest import API_KEY, forward_logprobs, sampler_logprobs, tokens, train
    from tests.processes import children_of
    from tests.vllm.required import require_vllm
    from tests.vllm.serving import ENGINE, run_vllm_server

    require_vllm()
    sequence = tokens(20)
    prompt = types.ModelInput.from_ints(sequence)
    flags = ("--device", "cuda", "--vllm-memory-share", str(MEMORY_SHARE))
    with (
        run_vllm_server(tmp_path, *flags) as server,
        tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as service,
    ):
        model = service.create_lora_training_client(server.base_model, rank=8, seed=1).result()
        before = forward_logprobs(model, sequence)
        train(model, 2, seed=0, learning_rate=5e-3)
        client = model.save_weights_and_get_sampling_client().result()
        expected = forward_logprobs(model, sequence)
        assert np.abs(expected - before).max() > 0.1
        np.testing.assert_allclose(sampler_logprobs(client, sequence), expected, rtol=0, atol=1e-4)
        params = types.SamplingParams(max_tokens=100, stop=[], seed=5)
        running = [client.sample(prompt, 2, params) for _ in range(8)]
        [engine] = [pid for pid, words in children_of(server.process).items() if ENGINE in words]
        os.kill(engine, signal.SIGKILL)
        for future in running:
            assert [len(each.tokens) for each in future.result().sequences] == [100, 100]
        np.testing.assert_allclose(sampler_logprobs(client, sequence), expected, rtol=0, atol=1e-4)
