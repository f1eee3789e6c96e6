"""``--deterministic --sampler vllm``: equal samples have equal bits, whatever else the engine does or has done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tinker
from tinker import types

from tests.e2e.conftest import API_KEY, tokens, train
from tests.vllm.serving import VllmServer, kill, run_vllm_server

pytestmark = pytest.mark.slow

PROMPTS = [types.ModelInput.from_ints(tokens(length, seed=length)) for length in (3, 20, 150)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    flags = ["--deterministic", "--max-revisions", "3", "--vllm-lora-slots", "2"]
    with run_vllm_server(tmp_path_factory.mktemp("deterministic"), *flags, name="tiny") as server:
        yield server


@pytest.fixture(scope="module")
def clients(server: VllmServer) -> Iterator[list[tinker.SamplingClient]]:
    """The bare base model, and more revisions than the engine holds."""
    with tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as service:
        model = service.create_lora_training_client("tiny", rank=8, seed=1).result()
        found = [service.create_sampling_client(base_model="tiny").result()]
        for _ in range(4):
            train(model, 1, learning_rate=5e-3)
            found.append(model.save_weights_and_get_sampling_client().result())
        yield found


def ask(client: tinker.SamplingClient) -> list[Any]:
    params = types.SamplingParams(max_tokens=24, stop=[], seed=11)
    return [client.sample(prompt, 2, params, include_prompt_logprobs=True) for prompt in PROMPTS]


def bits(futures: list[Any]) -> list[Any]:
    results = [future.result(timeout=180) for future in futures]
    return [
        (result.prompt_logprobs, [(list(each.tokens), list(each.logprobs)) for each in result.sequences])
        for result in results
    ]


def test_samples_have_the_same_bits_whatever_else_is_sampled(clients: list[tinker.SamplingClient]) -> None:
    alone = [bits(ask(client)) for client in clients]
    together = [ask(client) for client in [*reversed(clients), *clients]]
    answers = [bits(futures) for futures in together]
    assert answers == [*reversed(alone), *alone]
    assert len({str(each) for each in alone}) == len(clients)


def test_samples_have_the_same_bits_on_an_engine_that_took_the_place_of_another(
    server: VllmServer, clients: list[tinker.SamplingClient]
) -> None:
    before = [bits(ask(client)) for client in clients]
    asked = [ask(client) for client in clients]
    kill([server.engine()["Worker"]])
    assert [bits(futures) for futures in asked] == before
