"""Servers that are full, as the real SDK meets them: it waits, and every call succeeds."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.held_sampler import HOLD, HeldSampler
from tests.server.conftest import open_api
from tests.server.test_sdk_flow import datum
from tinker_core.engine import Engine
from tinker_core.errors import JournalFullError
from tinker_server import errors, services
from tinker_server.client_flags import ClientFlags
from tinker_server.limits import Limits

PROMPT = types.ModelInput.from_ints([3, 4, 5])
SHORT = types.SamplingParams(max_tokens=4)
DATA = [datum([3 + i, 4, 5, 6], [4, 5, 6, 7]) for i in range(6)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients cut every call into parts of two data, which they send as 2, 3, 1."""
    config = ClientFlags.config
    monkeypatch.setattr(
        ClientFlags,
        "config",
        lambda self, *args, **kwargs: {**config(self, *args, **kwargs), "fwdbwd_max_chunk_len": 2},
    )


def new_models(service: tinker.ServiceClient, number: int) -> list[tinker.TrainingClient]:
    creating = [service.create_lora_training_client(base_model="tiny", rank=2) for _ in range(number)]
    return [future.result() for future in creating]


def test_many_clients_with_hardly_any_room_all_get_their_results(tmp_path: Path, small_parts: None) -> None:
    bounds = {"max_queued_tokens": 2048, "max_queued_tokens_per_owner": 1024}
    with open_api(tmp_path, engine=bounds) as api:
        users = [tinker.ServiceClient(base_url=api.url, api_key="tml-test") for _ in range(2)]
        clients = [model for user in users for model in new_models(user, 2)]
        results: list[Any] = []
        for _ in range(2):
            for client in clients:
                results.append(client.forward_backward(DATA, "cross_entropy"))
                results.append(client.optim_step(types.AdamParams(learning_rate=0.01)))
        results += [client.save_state("end") for client in clients]
        assert all(future.result(timeout=60) for future in results)
        steps = [client.get_info().model_id for client in clients]
        assert len(set(steps)) == len(clients)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """The journal has no room for the first submission of each type; counts the submissions."""
    counts: collections.Counter[str] = collections.Counter()
    submit = Engine.submit

    async def submit_or_fail(engine: Engine, request: Any, caller: Any) -> Any:
        name = type(request).__name__
        counts[name] += 1
        if counts[name] == 1:
            raise JournalFullError("the journal is full; room comes with the next snapshots")
        return await submit(engine, request, caller)

    monkeypatch.setattr(Engine, "submit", submit_or_fail)
    monkeypatch.setattr(errors, "FULL_RETRY_SECONDS", 0.05)
    return counts


def test_a_full_journal_is_a_pause_for_every_kind_of_call(tmp_path: Path, full: collections.Counter[str]) -> None:
    with open_api(tmp_path) as api:
        service = tinker.ServiceClient(base_url=api.url, api_key="tml-test")
        client = service.create_lora_training_client(base_model="tiny", rank=2).result()
        results: list[Any] = [
            client.forward_backward(DATA, "cross_entropy"),
            client.optim_step(types.AdamParams(learning_rate=0.01)),
            client.save_state("a"),
            client.save_weights_for_sampler("b"),
        ]
        sampler = service.create_sampling_client(base_model="tiny").result()
        results.append(sampler.sample(PROMPT, 1, SHORT))
        assert all(future.result(timeout=60) for future in results)
    assert set(full) == {
        "CreateModelInput",
        "ForwardBackwardInput",
        "OptimStepInput",
        "SaveWeightsInput",
        "SaveWeightsForSamplerInput",
        "SampleInput",
    }
    assert set(full.values()) == {2}, "each was sent again until there was room"


def test_a_full_journal_is_answered_with_when_to_come_back(tmp_path: Path, full: collections.Counter[str]) -> None:
    with open_api(tmp_path) as api:
        refused = api.post("optim_step", {"model_id": "s-1:train:0", "seq_id": 1, "adam_params": {}})
        assert (refused.status_code, refused.headers["retry-after"], refused.headers["retry-after-ms"]) == (
            503,
            "1",
            "50",
        )
        assert "journal is full" in refused.json()["detail"]


def test_samples_over_the_bound_are_all_drawn_in_the_end(tmp_path: Path) -> None:
    with open_api(tmp_path, engine={"max_queued_samples": 8}) as api:
        sampler = (
            tinker.ServiceClient(base_url=api.url, api_key="tml-test")
            .create_sampling_client(base_model="tiny")
            .result()
        )
        samples = [sampler.sample(PROMPT, 1, SHORT) for _ in range(10)]
        assert all(future.result(timeout=60).sequences for future in samples)


def test_polls_over_the_bound_come_back_in_a_while_and_miss_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = collections.Counter[str]()
    retrieve = Engine.retrieve

    async def count(engine: Engine, request_id: str, patience: float, owner: str) -> Any:
        polls[f"{patience:g}"] += 1
        return await retrieve(engine, request_id, patience, owner)

    monkeypatch.setattr(Engine, "retrieve", count)
    monkeypatch.setattr(services, "CROWDED_POLL_SECONDS", 0.5)
    held = HeldSampler(slots=6)
    with open_api(tmp_path, sampler=held, limits=Limits(max_open_polls=2), poll_seconds=5.0) as api:
        sampler = (
            tinker.ServiceClient(base_url=api.url, api_key="tml-test")
            .create_sampling_client(base_model="tiny")
            .result()
        )
        samples = [sampler.sample(types.ModelInput.from_ints([HOLD, 4]), 1, SHORT) for _ in range(6)]
        for _ in samples:
            held.wait_started()
        with pytest.raises(TimeoutError):
            samples[0].result(timeout=0.8)  # so that the short polls come back once or twice
        held.release()
        assert all(future.result(timeout=60).sequences for future in samples)
    assert polls["5"] >= 2
    assert 4 <= polls["0.5"] <= 16, "four short polls at a time, and none of them spins"
