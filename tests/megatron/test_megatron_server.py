"""``tinker-server --backend megatron`` and the real SDK over HTTP: two tenants, saved state, and deaths."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import tinker
from tinker import types

from tests.e2e.conftest import datum, forward_logprobs, run_server, sampler_logprobs, tokens, train
from tests.models import write_tiny_model
from tests.processes import children_of, ranks_of
from tests.server.tenants import make_key

EXAMPLES = Path(__file__).parents[2] / "examples"
ADAM = types.AdamParams(learning_rate=0.02, eps=1e-8)


@attrs.frozen(kw_only=True)
class Server:
    url: str
    base_model: str
    data_dir: Path
    keys: dict[str, str]

    def client(self, owner: str) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.url, api_key=self.keys[owner])

    @property
    def process(self) -> int:
        [supervisor] = [pid for pid, words in children_of(os.getpid()).items() if str(self.data_dir) in words]
        [server] = children_of(supervisor)
        return server

    def pid_of_rank(self, wanted: int) -> int:
        [pid] = [pid for pid, rank in ranks_of(self.process).items() if rank == wanted]
        return pid


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    model, data_dir = write_tiny_model(root / "llama", "llama", tie=True), root / "data"
    data_dir.mkdir(mode=0o700)
    keys = {owner: make_key(data_dir, owner)[0] for owner in ("ann", "ben")}
    flags = ["--base-model", str(model), "--data-dir", str(data_dir), "--backend", "megatron", "--tensor-parallel", "2"]
    with run_server(*flags) as url:
        yield Server(url=url, base_model=str(model), data_dir=data_dir, keys=keys)


@pytest.fixture
def ann(server: Server) -> Iterator[tinker.ServiceClient]:
    with server.client("ann") as client:
        yield client


@pytest.fixture
def ben(server: Server) -> Iterator[tinker.ServiceClient]:
    with server.client("ben") as client:
        yield client


def new_model(service: tinker.ServiceClient, server: Server, seed: int = 1) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model=server.base_model, rank=4, seed=seed).result()


def submit(model: tinker.TrainingClient, num_steps: int) -> list[tuple[Any, Any]]:
    """What `train` does, without waiting for anything."""
    data = [datum(tokens(12 + i, i)) for i in range(3)]
    return [(model.forward_backward(data, "cross_entropy"), model.optim_step(ADAM)) for _ in range(num_steps)]


def norm(step: tuple[Any, Any]) -> float:
    passed, stepped = step
    passed.result()
    return (stepped.result().metrics or {})["grad_norm"]


def test_options_decide_the_number_of_ranks(server: Server) -> None:
    assert sorted(ranks_of(server.process).values()) == [0, 1]


def test_two_tenants_train_sample_and_keep_their_things_to_themselves(
    server: Server, ann: tinker.ServiceClient, ben: tinker.ServiceClient
) -> None:
    models = {"ann": new_model(ann, server, seed=1), "ben": new_model(ben, server, seed=2)}
    futures = {owner: submit(model, 3) for owner, model in models.items()}  # passes of both may be packed together
    norms = {owner: [norm(future) for future in found] for owner, found in futures.items()}
    alone = train(new_model(ann, server, seed=1), 3)
    np.testing.assert_allclose(norms["ann"], alone, rtol=1e-4)
    assert abs(norms["ben"][0] - alone[0]) > 1e-3
    sequence = tokens(20, 5)
    samplers = {owner: model.save_weights_and_get_sampling_client().result() for owner, model in models.items()}
    for owner, model in models.items():
        expected = forward_logprobs(model, sequence)
        np.testing.assert_allclose(sampler_logprobs(samplers[owner], sequence), expected, atol=1e-4)
    saved = models["ann"].save_state("mine").result().path
    with pytest.raises(tinker.TinkerError, match="mine"):
        ben.create_training_client_from_state(saved).result()


def test_sampled_tokens_have_the_trainers_logprobs(server: Server, ann: tinker.ServiceClient) -> None:
    model = new_model(ann, server)
    train(model, 2)
    path = model.save_weights_for_sampler("weights").result().path
    client = ann.create_sampling_client(model_path=path).result()
    prompt = tokens(9, 3)
    params = types.SamplingParams(max_tokens=10, stop=[], seed=4)
    sampled = client.sample(types.ModelInput.from_ints(prompt), 3, params).result().sequences
    assert len({tuple(each.tokens) for each in sampled}) > 1
    for each in sampled:
        expected = forward_logprobs(model, prompt + list(each.tokens))[len(prompt) - 1 :]
        np.testing.assert_allclose(each.logprobs, expected, atol=1e-4)


def test_saved_state_comes_back_with_its_optimizer(server: Server, ann: tinker.ServiceClient) -> None:
    model = new_model(ann, server)
    train(model, 2)
    path = model.save_state("half").result().path
    expected = train(model, 2)
    again = ann.create_training_client_from_state_with_optimizer(path).result()
    np.testing.assert_allclose(train(again, 2), expected, rtol=1e-5)


@pytest.mark.parametrize("victim", ["rank", pytest.param("server", marks=pytest.mark.slow)])
def test_a_death_under_load_costs_nothing_but_time(server: Server, ann: tinker.ServiceClient, victim: str) -> None:
    expected = train(new_model(ann, server), 6)
    model = new_model(ann, server)
    assert train(model, 2) == pytest.approx(expected[:2], rel=1e-4)
    client = model.save_weights_and_get_sampling_client().result()
    sequence = tokens(20, 5)
    before = sampler_logprobs(client, sequence)
    steps = submit(model, 4)
    pid = server.pid_of_rank(1) if victim == "rank" else server.process
    os.kill(pid, signal.SIGKILL)
    assert [norm(step) for step in steps] == pytest.approx(expected[2:], rel=1e-4)
    assert pid not in (server.process, *ranks_of(server.process))
    np.testing.assert_allclose(sampler_logprobs(client, sequence), before, atol=1e-5)


@pytest.mark.slow
def test_the_rl_example_runs_unchanged(server: Server) -> None:
    command = [sys.executable, str(EXAMPLES / "rl.py"), "--steps", "2", "--prompts", "2", "--group-size", "3"]
    environment = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": server.keys["ben"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"step +\d+  mean reward \d\.\d\d", done.stdout)) == 2
