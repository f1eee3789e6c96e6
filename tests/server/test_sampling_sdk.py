"""Samples in flight, as the unmodified SDK sees them: polled together, cancelled, cloned, outliving their server."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.held_sampler import HOLD, HeldSampler, prompt_json
from tests.sampling_worker import sample_elsewhere
from tests.server.conftest import Api, open_api
from tinker_server.client_flags import ClientFlags

SHORT = types.SamplingParams(max_tokens=4)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-dummy")
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


def prompt(first: int = 3) -> types.ModelInput:
    return types.ModelInput.from_ints([first, 4, 5])


def http_count(api: Api, route: str) -> int:
    """Requests for a route that the server has answered, whatever it said."""
    text = httpx.get(f"{api.url}/metrics").text
    found = re.findall(rf'tinker_http_requests_total{{[^}}]*route="{re.escape(route)}"[^}}]*}} (\S+)', text)
    return int(sum(float(value) for value in found))


# --- one poll for many samples ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    flags = ClientFlags(retrieve_futures=True)
    with open_api(tmp_path_factory.mktemp("together"), flags=flags, poll_seconds=1.0) as api:
        yield api


def test_one_poll_serves_all_samples_of_a_client_and_each_result_is_fetched_once(together: Api) -> None:
    with tinker.ServiceClient(base_url=together.url) as service:
        sampler = service.create_sampling_client(base_model="tiny").result()
        futures = [sampler.sample(prompt(3 + i % 9), 2, SHORT, include_prompt_logprobs=True) for i in range(100)]
        results = [future.result() for future in futures]
    assert {len(result.sequences) for result in results} == {2}
    assert {len(result.prompt_logprobs or ()) for result in results} == {3}
    assert http_count(together, "/api/v1/retrieve_future") == 100
    assert 0 < http_count(together, "/api/v1/retrieve_futures") < 100


def test_a_sample_that_fails_is_told_apart_by_the_poll(together: Api) -> None:
    with tinker.ServiceClient(base_url=together.url) as service:
        sampler = service.create_sampling_client(base_model="tiny").result()
        bad = sampler.sample(types.ModelInput.from_ints([10**6]), 1, SHORT)
        good = sampler.sample(prompt(), 1, SHORT)
        unreadable = sampler.sample(prompt(), 10**6, SHORT)
        with pytest.raises(tinker.RequestFailedError, match="token ids"):
            bad.result()
        with pytest.raises(tinker.RequestFailedError, match="num_samples must be 1 to"):
            unreadable.result()
        assert good.result().sequences


def test_a_poll_names_what_is_new_and_acknowledgements_drop_results(together: Api) -> None:
    sampler = new_sampler(together)
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 2}

    def poll(cursor: int, **fields: Any) -> dict[str, Any]:
        answer = together.post("retrieve_futures", {"target": target, "prev_cursor": cursor, **fields})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    first = poll(0)
    assert first["completions"] == []
    ids = [asample(together, sampler, seq_id=2 * 10**9 + number) for number in range(3)]
    failing = asample(together, sampler, seq_id=2 * 10**9 + 3, prompt=prompt_json(99))
    seen: dict[str, dict[str, Any]] = {}
    cursor = first["cursor"]
    while len(seen) < 4:
        page = poll(cursor)
        assert page["cursor"] > cursor
        assert not seen.keys() & {item["request_id"] for item in page["completions"]}
        seen.update({item["request_id"]: item for item in page["completions"]})
        cursor = page["cursor"]
    assert seen[failing] == {"state": "failed", "request_id": failing}
    assert all(seen[i]["state"] == "finished" and seen[i]["response_payload_uncompressed_size"] > 0 for i in ids)
    other = asample(together, sampler, seq_id=7)  # of the original client, not of this clone
    together.retrieve(other)
    together.retrieve(ids[0])
    assert poll(cursor, timeout=0, retrieved_request_ids=[ids[0], other, "req-unknown"])["completions"] == []
    assert together.retrieve(ids[0]).status_code == 200  # out of memory, but kept for a while
    assert together.retrieve(ids[1]).status_code == 200
    assert together.retrieve(other).status_code == 200
    # Who comes with the cursor of another server process begins anew, with all that is kept.
    again = poll(5)
    assert {item["request_id"] for item in again["completions"]} == {*ids, failing}
    assert poll(again["cursor"], timeout=0)["completions"] == []


def new_sampler(api: Api) -> str:
    body = {"session_id": api.session(), "sampling_session_seq_id": 0, "base_model": "tiny"}
    return str(api.post("create_sampling_session", body).json()["sampling_session_id"])


def asample(api: Api, sampler: str, seq_id: int, **fields: Any) -> str:
    body = {"sampling_session_id": sampler, "seq_id": seq_id, "prompt": prompt_json(3), "sampling_params": {}}
    answer = api.post("asample", {**body, **fields})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


# --- samples that take long -------------------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Api, HeldSampler]]:
    sampler = HeldSampler(slots=1)
    with open_api(tmp_path / "data", sampler=sampler, poll_seconds=0.2) as api:
        yield api, sampler


def test_a_cancelled_sample_frees_its_slot_and_one_in_the_queue_never_begins(held: tuple[Api, HeldSampler]) -> None:
    api, sampler = held
    with tinker.ServiceClient(base_url=api.url) as service:
        client = service.create_sampling_client(base_model="tiny").result()
        first = client.sample(prompt(HOLD), 1, SHORT)
        running = sampler.wait_started()
        queued = new_sampler(api), 1
        waiting = asample(api, *queued, prompt=prompt_json(HOLD))
        # The polls of both tell the truth.
        assert pending(api, running) == ("active", None)
        assert pending(api, waiting) == ("paused_capacity", "waiting for a sampler slot")
        # The client gives up: its slot goes to the next in the queue.
        assert first.future().cancel()
        assert sampler.wait_cancelled() == running
        assert sampler.wait_started() == waiting
        with pytest.raises(CancelledError):
            first.result()
        failed = api.retrieve(running).json()
        assert failed == {"error": f"request {running!r} was cancelled by its client", "category": "user"}
        # One that waits is dropped before it ever begins.
        third = asample(api, queued[0], 2, prompt=prompt_json(HOLD))
        assert api.post("cancel_future", {"request_id": third}).status_code == 200
        assert sampler.wait_cancelled() == third
        sampler.release()
        assert api.retrieve(waiting, "application/x-protobuf").status_code == 200
        assert api.post("cancel_future", {"request_id": waiting}).status_code == 200  # too late, and no matter
        assert api.retrieve(waiting, "application/x-protobuf").status_code == 200
        assert sampler.started.empty()


def pending(api: Api, request_id: str) -> tuple[str, str | None]:
    answer = api.post("retrieve_future", {"request_id": request_id})
    assert answer.status_code == 408, answer.text
    return answer.json()["queue_state"], answer.json().get("queue_state_reason")


def test_only_samples_can_be_cancelled(held: tuple[Api, HeldSampler]) -> None:
    api, _ = held
    session_id = api.session()
    body = {"session_id": session_id, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
    created = api.post("create_model", body).json()["request_id"]
    refused = api.post("cancel_future", {"request_id": created})
    assert (refused.status_code, "only samples" in refused.json()["detail"]) == (400, True)


@pytest.mark.parametrize("polled_together", [False, True])
def test_a_sample_in_progress_when_its_server_stops_is_finished_by_the_next(
    tmp_path: Path, polled_together: bool
) -> None:
    first, second = HeldSampler(), HeldSampler()
    settings: dict[str, Any] = {"flags": ClientFlags(retrieve_futures=polled_together), "poll_seconds": 0.2}
    with open_api(tmp_path / "data", sampler=first, **settings) as api:
        service = tinker.ServiceClient(base_url=api.url)
        client = service.create_sampling_client(base_model="tiny").result()
        assert client.sample(prompt(), 1, SHORT).result().sequences
        future = client.sample(prompt(HOLD), 1, SHORT)
        waiting = first.wait_started()
    with open_api(tmp_path / "data", sampler=second, port=int(api.url.rpartition(":")[2]), **settings) as again:
        assert second.wait_started() == waiting
        second.release()
        assert future.result().sequences[0].tokens == [5, 6]
        assert client.sample(prompt(), 1, SHORT).result().sequences
        assert again.retrieve(waiting, "application/x-protobuf").status_code == 200
        assert again.retrieve("req-" + "A" * 36).status_code == 404
        service.close("success", None)


def test_who_was_silent_for_long_is_told_to_send_a_sample_that_had_not_begun_again(tmp_path: Path) -> None:
    sampler = HeldSampler(slots=1)
    with open_api(tmp_path / "data", sampler=sampler, poll_seconds=0.2, engine={"unseen_seconds": 2.0}) as api:
        target = new_sampler(api)
        api.retrieve(asample(api, target, 9))  # the workers run, and polls are signs of life
        running, waiting = [asample(api, target, seq_id, prompt=prompt_json(HOLD)) for seq_id in range(2)]
        assert sampler.wait_started() == running
        assert sampler.wait_cancelled() == waiting
        gone = api.retrieve(waiting)
        assert (gone.status_code, "nothing was heard of its client" in gone.text) == (410, True)
        sampler.release()
        assert api.retrieve(running, "application/x-protobuf").status_code == 200


# --- clones in other processes ----------------------------------------------------------------------------------------


def test_clients_work_in_other_processes_and_never_share_a_number(together: Api) -> None:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with tinker.ServiceClient(base_url=together.url) as service:
        training = service.create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
        client = training.save_weights_and_get_sampling_client().result()
        expected = client.sample(prompt(), 1, types.SamplingParams(max_tokens=3, seed=1)).result().sequences[0].tokens
        workers = [
            context.Process(target=sample_elsewhere, args=(each, answers))
            for each in (client, client.get_sampler_handle())
        ]
        for worker in workers:
            worker.start()
        found = [answers.get(timeout=120) for _ in workers]
        for worker in workers:
            worker.join(timeout=60)
            assert worker.exitcode == 0
    assert [tokens for tokens, _ in found] == [[expected] * 5] * 2
    assert sorted(number for _, number in found) == [1, 2]


# --- ephemeral weights ------------------------------------------------------------------------------------------------


def test_inflight_clients_follow_inflight_saves_only(together: Api) -> None:
    def ask(client: tinker.SamplingClient) -> list[float | None]:
        return client.compute_logprobs(prompt()).result()

    def step() -> None:
        datum = types.Datum(
            model_input=prompt(),
            loss_fn_inputs={"target_tokens": [4, 5, 6], "weights": [1.0, 1.0, 1.0]},  # type: ignore[dict-item]
        )
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=0.1)).result()

    with tinker.ServiceClient(base_url=together.url) as service:
        training = service.create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
        save = training.save_weights_and_get_sampling_client
        first = save(kind="inflight").result()
        frozen = save(kind="snapshot").result()
        untrained = ask(first)
        step()
        save(kind="snapshot").result()
        training.save_weights_for_sampler("named").result()
        assert ask(first) == ask(frozen) == untrained  # neither steps nor other saves move the target
        second = save(kind="inflight").result()
        assert ask(first) == ask(second) != untrained
        assert ask(frozen) == untrained
