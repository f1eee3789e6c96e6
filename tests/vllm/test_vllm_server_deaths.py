"""``tinker-server --sampler vllm`` while its processes are stopped and killed: the SDK sees nothing but latency."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.chaos.tree import wait_gone
from tests.e2e.conftest import API_KEY, datum, forward_logprobs, tokens, train
from tests.vllm.serving import PATIENCE, VllmServer, kill, run_vllm_server

SEQUENCE = tokens(20)
PROMPT = types.ModelInput.from_ints(SEQUENCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    small = ["--max-revisions", "3", "--vllm-lora-slots", "2", "--max-decode-batch", "8"]
    directory = tmp_path_factory.mktemp("killed")
    with run_vllm_server(directory, *small, name="tiny") as server:
        yield server
        processes = [*server.engine().values(), *server.ranks()]
    assert wait_gone(processes, PATIENCE) == []
    assert list((directory / "handoff").iterdir()) == []


@pytest.fixture
def service(server: VllmServer) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as service:
        yield service


@pytest.fixture
def model(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny", rank=4, seed=1).result()


def step(model: tinker.TrainingClient, num_steps: int = 1) -> None:
    train(model, num_steps, learning_rate=5e-3)


def ask_long(clients: list[tinker.SamplingClient]) -> list[Any]:
    """Enough samples that most of them still run, or wait, when these have been sent."""
    params = types.SamplingParams(max_tokens=200, stop=[], seed=5)
    return [client.sample(PROMPT, 4, params) for client in clients for _ in range(2)]


def answers(futures: list[Any]) -> list[list[tuple[list[int], list[float]]]]:
    results = [future.result(timeout=180) for future in futures]
    return [[(list(each.tokens), list(each.logprobs)) for each in result.sequences] for result in results]


def assert_same_answers(found: list[Any], expected: list[Any]) -> None:
    """The same tokens; logprobs may be rounded in another order, for another batch."""
    for result, wanted in zip(found, expected, strict=True):
        for (some, logprobs), (others, wanted_logprobs) in zip(result, wanted, strict=True):
            assert some == others
            np.testing.assert_allclose(logprobs, wanted_logprobs, rtol=0, atol=1e-4)


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    pids = list(pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def weights(model: tinker.TrainingClient, number: int) -> tuple[list[tinker.SamplingClient], list[np.ndarray]]:
    """Several revisions of a model, and what the trainer says of each."""
    clients, expected = [], []
    for _ in range(number):
        step(model)
        clients.append(model.save_weights_and_get_sampling_client().result())
        expected.append(forward_logprobs(model, SEQUENCE))
    return clients, expected


def assert_all_sampled(clients: list[tinker.SamplingClient], expected: list[np.ndarray]) -> None:
    asked = [client.compute_logprobs(PROMPT) for client in clients]
    for future, wanted in zip(asked, expected, strict=True):
        values = np.array(future.result(timeout=180)[1:], np.float64)
        np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sampling_goes_on_while_the_trainer_stands_still(server: VllmServer, model: tinker.TrainingClient) -> None:
    clients, expected = weights(model, 2)
    with stopped(server.ranks()):
        trained = model.forward([datum(SEQUENCE)], "cross_entropy")
        assert_all_sampled(clients, expected)
        assert len(answers(ask_long(clients))) == 4
        assert not trained.future().done()
    assert trained.result().loss_fn_outputs


@pytest.mark.slow
def test_training_goes_on_while_the_engine_stands_still(server: VllmServer, model: tinker.TrainingClient) -> None:
    [client], [expected] = weights(model, 1)
    with stopped(server.engine().values()):
        asked = client.compute_logprobs(PROMPT)
        step(model, 2)
        assert model.save_state("beside").result().path
        assert model.save_weights_for_sampler("beside").result().path
        assert not asked.future().done()
    np.testing.assert_allclose(np.array(asked.result()[1:], np.float64), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_ranks_that_are_killed_take_no_sample_and_no_weights_with_them(
    server: VllmServer, model: tinker.TrainingClient
) -> None:
    clients, expected = weights(model, 2)
    calm = answers(ask_long(clients))
    losses = server.metric("tinker_worker_losses_total")
    asked = ask_long(clients)
    kill(server.ranks())
    assert_all_sampled(clients, expected)
    assert_same_answers(answers(asked), calm)
    np.testing.assert_allclose(forward_logprobs(model, SEQUENCE), expected[-1], rtol=0, atol=1e-5)
    assert server.metric("tinker_worker_losses_total") == losses + 1
    more, expected_of_more = weights(model, 1)
    assert_all_sampled([*clients, *more], [*expected, *expected_of_more])


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim",
    ["Worker", "main", "EngineCore"],
)
def test_an_engine_that_is_killed_loses_no_sample_and_training_does_not_notice(
    server: VllmServer, model: tinker.TrainingClient, victim: str
) -> None:
    clients, expected = weights(model, 4)  # one more than are resident
    calm = answers(ask_long(clients))
    asked = ask_long(clients)
    family = server.engine()
    kill([family[victim]])
    step(model)
    after = model.save_weights_and_get_sampling_client().result()  # it need not wait for an engine
    assert_same_answers(answers(asked), calm)
    assert_all_sampled([*clients, after], [*expected, forward_logprobs(model, SEQUENCE)])
    assert not set(server.engine().values()) & set(family.values())
    assert wait_gone(family.values(), PATIENCE) == []  # nothing of the lost engine stays behind


@pytest.mark.slow
def test_a_server_that_is_killed_comes_back_with_all_weights_that_were_not_saved(
    server: VllmServer, model: tinker.TrainingClient
) -> None:
    clients, expected = weights(model, 4)
    moving = model.save_weights_and_get_sampling_client(kind="inflight").result()
    calm = answers(ask_long(clients))
    asked = ask_long(clients)
    processes = [*server.engine().values(), *server.ranks()]
    kill([server.process])
    assert wait_gone(processes, PATIENCE) == []
    assert_same_answers(answers(asked), calm)
    assert_all_sampled([*clients, moving], [*expected, expected[-1]])
    step(model)
    again = model.save_weights_and_get_sampling_client(kind="inflight").result()
    after = forward_logprobs(model, SEQUENCE)
    assert_all_sampled([again, moving], [after, after])
