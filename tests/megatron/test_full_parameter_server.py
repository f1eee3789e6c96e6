"""``tinker-server --backend megatron --full-parameter`` and the real SDK: rank 0, samplers, saved state, one tenant."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types

from tests.e2e.conftest import API_KEY, forward_logprobs, run_server, sampler_logprobs, tokens, train
from tests.megatron.full_reference import Reference
from tests.models import write_tiny_model
from tests.processes import children_of, ranks_of
from tinker_core.testing.trainer_lab import make_datum

pytestmark = pytest.mark.slow

PROMPT = tokens(20, 5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), "qwen3", tie=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def url(base: Path, data_dir: Path) -> Iterator[str]:
    flags = ["--base-model", str(base), "--data-dir", str(data_dir / "data"), "--backend", "megatron"]
    with run_server(*flags, "--full-parameter", "--sampler", "colocated", "--tensor-parallel", "2") as url:
        yield url


@pytest.fixture
def service(url: str) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=url, api_key=API_KEY) as client:
        yield client


def new_model(service: tinker.ServiceClient, base: Path, rank: int = 0) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model=str(base), rank=rank).result()


def reference_logprobs(directory: Path) -> np.ndarray:
    datum = make_datum(PROMPT[:-1], PROMPT[1:])
    return np.asarray(Reference(directory).logprobs(datum).detach().numpy(), dtype=np.float64)


def test_samples_are_of_the_weights_that_were_published_whatever_is_trained_meanwhile(
    service: tinker.ServiceClient, base: Path
) -> None:
    model = new_model(service, base)
    bare = service.create_sampling_client(base_model=str(base)).result()
    original = reference_logprobs(base)
    np.testing.assert_allclose(sampler_logprobs(bare, PROMPT), original, atol=1e-4)
    expected, clients = [original], [bare]
    for seed in (1, 2):
        train(model, 2, seed=seed)
        expected.append(forward_logprobs(model, PROMPT))
        clients.append(model.save_weights_and_get_sampling_client().result())
    train(model, 1, seed=3)
    assert min(np.abs(first - second).mean() for first, second in itertools.pairwise(expected)) > 0.05
    wanted = [
        (client, values) for _ in range(2) for client, values in zip(clients, expected, strict=True)
    ]  # each between others
    given = types.ModelInput.from_ints(PROMPT)
    params = types.SamplingParams(max_tokens=12, stop=[], seed=4)
    drawn = [client.sample(given, 2, params) for client, _ in wanted]
    scored = [client.compute_logprobs(given) for client, _ in wanted]
    for future, (_, values) in zip(scored, wanted, strict=True):
        np.testing.assert_allclose(np.array(future.result()[1:], np.float64), values, atol=1e-4)
    texts = [[tuple(each.tokens) for each in future.result().sequences] for future in drawn]
    assert texts[:3] == texts[3:]
    assert len({*map(tuple, texts)}) == 3


def test_saved_weights_are_a_model_and_saved_state_comes_back(
    service: tinker.ServiceClient, base: Path, url: str
) -> None:
    model = new_model(service, base)
    info = model.get_info()
    assert (info.is_lora, info.lora_rank) == (False, None)
    train(model, 2)
    state = model.save_state("half").result().path
    path = model.save_weights_for_sampler("weights").result().path
    expected = train(model, 2)
    service.close("success").result()
    with tinker.ServiceClient(base_url=url, api_key=API_KEY) as later:
        again = later.create_training_client_from_state_with_optimizer(state).result()
        weights = forward_logprobs(again, PROMPT)
        np.testing.assert_allclose(train(again, 2), expected, rtol=1e-5)
        saved = later.create_sampling_client(model_path=path).result()
        np.testing.assert_allclose(sampler_logprobs(saved, PROMPT), weights, atol=1e-4)
        found = tinker.RestClient(base_url=url, api_key=API_KEY).get_weights_info_by_tinker_path(state).result()
        assert (found.is_lora, found.lora_rank) == (False, None)


def test_a_second_model_and_adapters_are_refused_with_what_to_do(service: tinker.ServiceClient, base: Path) -> None:
    with pytest.raises(tinker.TinkerError, match="create the model with rank 0"):
        new_model(service, base, rank=8)
    model = new_model(service, base)
    with pytest.raises(tinker.TinkerError, match="one model at a time"):
        new_model(service, base)
    train(model, 1)


def test_a_rank_that_dies_costs_nothing_but_time(service: tinker.ServiceClient, base: Path, data_dir: Path) -> None:
    model = new_model(service, base)
    train(model, 2)
    client = model.save_weights_and_get_sampling_client().result()
    before = forward_logprobs(model, PROMPT)
    [supervisor] = [pid for pid, words in children_of(os.getpid()).items() if str(data_dir / "data") in words]
    [server] = children_of(supervisor)
    [victim] = [pid for pid, rank in ranks_of(server).items() if rank == 1]
    os.kill(victim, signal.SIGKILL)
    np.testing.assert_allclose(forward_logprobs(model, PROMPT), before, atol=1e-5)
    np.testing.assert_allclose(sampler_logprobs(client, PROMPT), before, atol=1e-4)
