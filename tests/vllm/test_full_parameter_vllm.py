"""All parameters, trained with Megatron-Core and sampled with vLLM, which is given whole models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinker

from tests.e2e.conftest import API_KEY, forward_logprobs, run_server, sampler_logprobs, tokens, train
from tests.models import write_tiny_model
from tests.vllm.conftest import HIDDEN_SIZE

pytestmark = pytest.mark.slow

SEQUENCE = tokens(20)


def test_vllm_samples_from_the_whole_model_that_is_trained(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")
    base = write_tiny_model(tmp_path / "base", "qwen3", tie=True, hidden_size=HIDDEN_SIZE)
    flags = ["--base-model", str(base), "--data-dir", str(tmp_path / "data"), "--handoff-dir", str(tmp_path)]
    # Trainer and sampler are compared at start: bare, and with all parameters trained.
    command = [*flags, "--backend", "megatron", "--full-parameter", "--sampler", "vllm", "--vllm-kv-cache-mib", "64"]
    with run_server(*command) as url, tinker.ServiceClient(base_url=url, api_key=API_KEY) as service:
        bare = service.create_sampling_client(base_model=str(base)).result()
        model = service.create_lora_training_client(base_model=str(base), rank=0).result()
        clients, expected = [bare], [forward_logprobs(model, SEQUENCE)]
        for seed in (1, 2):
            train(model, 2, seed=seed, learning_rate=5e-3)
            expected.append(forward_logprobs(model, SEQUENCE))
            clients.append(model.save_weights_and_get_sampling_client().result())
        assert np.abs(expected[2] - expected[1]).max() > 0.1
        for client, values in [*zip(clients, expected, strict=True)] * 2:
            np.testing.assert_allclose(sampler_logprobs(client, SEQUENCE), values, rtol=0, atol=5e-5)
