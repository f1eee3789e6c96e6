"""Weights that leave the server, or come back to it, mean what they meant inside it."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import numpy as np
import pyrage  # type: ignore[import-untyped]
import pytest
import tinker
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import API_KEY, NewModel, Server, forward_logprobs, sampler_logprobs, tokens, train

PROBE = tokens(20, seed=99)


@pytest.fixture
def rest(server: Server) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=API_KEY)


def test_external_weights_give_the_same_logprobs_in_plain_peft(
    server: Server, rest: tinker.RestClient, new_model: NewModel, tmp_path: Path
) -> None:
    model = new_model(base_model=server.qwen3, rank=8)
    train(model, 3)
    expected = forward_logprobs(model, PROBE)
    identity = pyrage.x25519.Identity.generate()
    saved = model.save_weights_external("out", age_encryption_recipients=[str(identity.to_public())]).result()
    urls = rest.get_external_weights_urls(saved.path).result().urls
    assert sorted(urls) == ["adapter_config.json.age", "adapter_model.safetensors.age"]
    for name, url in urls.items():
        encrypted = tmp_path / name
        urllib.request.urlretrieve(url, encrypted)
        pyrage.decrypt_file(str(encrypted), str(tmp_path / name.removesuffix(".age")), [identity])
        encrypted.unlink()
    base = AutoModelForCausalLM.from_pretrained(server.qwen3, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        logits = peft(torch.tensor([PROBE[:-1]])).logits[0]
    logprobs = torch.log_softmax(logits, -1)[torch.arange(len(PROBE) - 1), torch.tensor(PROBE[1:])]
    np.testing.assert_allclose(logprobs.numpy(), expected, atol=1e-5)


def test_copies_train_and_sample_as_their_sources_did(
    service: tinker.ServiceClient, rest: tinker.RestClient, new_model: NewModel
) -> None:
    model = new_model()
    train(model, 3)
    state, sampler = (model.save_state("state").result().path, model.save_weights_for_sampler("final").result().path)
    expected = forward_logprobs(model, PROBE)
    copies = [rest.copy_weights(path, "archive").result() for path in (state, sampler)]
    for path in (state, sampler):
        rest.delete_checkpoint_from_tinker_path(path).result()
    loaded = service.create_training_client_from_state_with_optimizer(copies[0]).result()
    np.testing.assert_array_equal(forward_logprobs(loaded, PROBE), expected)
    sampling = service.create_sampling_client(model_path=copies[1]).result()
    np.testing.assert_allclose(sampler_logprobs(sampling, PROBE), expected, atol=1e-5)
    assert train(loaded, 2, seed=7) == train(model, 2, seed=7)  # the moments came along
