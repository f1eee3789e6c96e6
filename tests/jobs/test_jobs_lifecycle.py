"""How jobs begin, go on and end, on a real server whose jobs' processes play what a test tells them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.jobs.hosting import JOBS, JobsApi
from tests.jobs.scripted import entries, finished, follow, messages, open_gate, serve_scripted, starts, submit, wait_for
from tinker_core.errors import StorageError
from tinker_core.extensions import IssuedKey
from tinker_jobs.records import JobRecord
from tinker_jobs.service import runner
from tinker_jobs.service.keys import RunKeys


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsApi]:
    """Two jobs run at once."""
    with serve_scripted(tmp_path_factory.mktemp("lifecycle"), max_running=2) as api:
        yield api


# --- a job that runs to its end ---------------------------------------------------------------------------------------


def test_a_job_is_queued_then_runs_and_completes(api: JobsApi) -> None:
    job_id = submit(api, "start", "step 1 3.0", "gate g", "step 2 2.0", "save 2", "end")
    wait_for(api, job_id, "at gate g")
    running = api.get(job_id).json()
    assert running["status"] == "running"
    assert running["started_at"] is not None
    assert running["completed_at"] is None
    assert running["metrics"] == {"steps": [1], "train/loss": [3.0], "train/steps": 1}
    assert api.http.get(JOBS).json()["items"][0] == running
    open_gate(api, job_id)
    job = finished(api, job_id)
    assert job["status"] == "completed"
    assert job["error"] is None
    assert job["completed_at"] >= job["started_at"] == running["started_at"]
    series = {"steps": [1, 2], "train/loss": [3.0, 2.0]}
    assert job["metrics"] == {**series, "train/steps": 2, "train/loss_last": 0.5}
    assert job["artifacts"] == {"latest_checkpoint": "tinker://weights/2", "checkpoints": ["tinker://weights/final"]}
    said = ["queued", "started, attempt 1", "training", "step 1", "at gate g", "step 2", "saved 2", "done"]
    assert messages(api, job_id) == said
    assert api.http.get(JOBS).json()["items"][0] == job


def test_a_job_that_reports_an_error_fails_with_it(api: JobsApi) -> None:
    job_id = submit(api, "start", "step 1 3.0", "fail row 17 is no JSON")
    job = finished(api, job_id)
    assert (job["status"], job["error"]) == ("failed", "row 17 is no JSON")
    assert job["metrics"]["train/loss"] == [3.0]
    assert entries(api, job_id)[-1]["level"] == "error"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("hello", "not an event"),
        ('{"event_type": "dance", "message": "x"}', "dance"),
        ('{"event_type": "log", "message": "x", "metrics": {"steps": [1], "train/loss": [1, 2]}}', "2 values for 1"),
    ],
)
def test_a_process_that_says_what_is_no_event_fails_the_job(api: JobsApi, line: str, reason: str) -> None:
    job_id = submit(api, "step 1 3.0", f"say {line}", "hang")
    job = finished(api, job_id)
    assert job["status"] == "failed"
    assert "what is no event" in job["error"]
    assert reason in job["error"]
    assert job["metrics"]["steps"] == [1]
    assert "step 1" in messages(api, job_id)


def test_the_server_keeps_its_secrets_from_jobs(api: JobsApi, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"TINKER_API_KEY", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY"}
    for name in (*secrets, "HARMLESS"):
        monkeypatch.setenv(name, "x")
    job_id = submit(api, "start", "end")
    finished(api, job_id)
    (start,) = starts(api, job_id)
    assert not secrets & set(start["environment"])
    assert {"HARMLESS", "PATH"} <= set(start["environment"])
    assert start["key"] == "tml-local"


# --- cancelling and retrying ------------------------------------------------------------------------------------------


def test_a_running_job_is_cancelled_between_steps_and_asking_twice_changes_nothing(api: JobsApi) -> None:
    job_id = submit(api, "start", "step 1 3.0", "save 1", "gate g", "wait")
    wait_for(api, job_id, "at gate g")
    first = api.http.post(f"{JOBS}/{job_id}/cancel").json()
    assert first["status"] == "running"
    assert first["cancel_requested_at"] is not None
    assert api.http.post(f"{JOBS}/{job_id}/cancel").json() == first
    open_gate(api, job_id)
    job = finished(api, job_id)
    assert (job["status"], job["error"]) == ("cancelled", None)
    assert job["cancel_requested_at"] == first["cancel_requested_at"]
    assert job["artifacts"] == {"latest_checkpoint": "tinker://weights/1"}
    refused = api.http.post(f"{JOBS}/{job_id}/cancel")
    assert refused.status_code == 409
    assert "cancelled already" in refused.json()["detail"]


def test_a_job_that_dies_when_it_is_asked_to_stop_is_cancelled(api: JobsApi) -> None:
    job_id = submit(api, "start", "gate g", "kill")
    wait_for(api, job_id, "at gate g")
    api.http.post(f"{JOBS}/{job_id}/cancel")
    open_gate(api, job_id)
    assert finished(api, job_id)["status"] == "cancelled"


def test_a_queued_job_is_cancelled_at_once_and_never_runs(api: JobsApi) -> None:
    running = [submit(api, "gate g", "end") for _ in range(2)]
    waiting = submit(api, "start", "end")
    job = api.http.post(f"{JOBS}/{waiting}/cancel").json()
    assert job["status"] == "cancelled"
    assert job["completed_at"] is not None
    assert job["started_at"] is None
    for job_id in running:
        wait_for(api, job_id, "at gate g")
        open_gate(api, job_id)
        finished(api, job_id)
    last = submit(api, "end")
    finished(api, last)
    assert starts(api, waiting) == []


def test_a_job_is_retried_from_the_beginning_under_its_id_and_keeps_its_log(api: JobsApi) -> None:
    job_id = submit(api, "start", "step 1 3.0", "save 1", "kill 1", "gate g", "fail no luck")
    wait_for(api, job_id, "at gate g")
    assert api.http.post(f"{JOBS}/{job_id}/retry").status_code == 409
    open_gate(api, job_id)
    failed = finished(api, job_id)
    before = messages(api, job_id)
    queued = api.http.post(f"{JOBS}/{job_id}/retry").json()
    assert queued["id"] == job_id
    cleared = ("error", "started_at", "completed_at", "cancel_requested_at")
    assert [queued[name] for name in cleared] == [None] * 4
    assert (queued["metrics"], queued["artifacts"]) == ({}, {})
    wait_for(api, job_id, "retry #1")
    again = api.get(job_id).json()
    assert again["created_at"] == failed["created_at"]
    assert [entry for entry in follow_to_gate(api, job_id) if entry == "step 1"] == ["step 1"] * 2
    open_gate(api, job_id)
    assert finished(api, job_id)["error"] == "no luck"
    assert messages(api, job_id)[: len(before)] == before
    assert [start["attempt"] for start in starts(api, job_id)] == [1, 2, 3]
    assert [start["metrics"] for start in starts(api, job_id)][2] == {}


def follow_to_gate(api: JobsApi, job_id: str) -> list[str]:
    """The log up to the last gate of a job that comes to it twice."""
    found: list[str] = []
    for entry in follow(api, job_id):
        found.append(entry["message"])
        if found.count("at gate g") == 2:
            break
    return found


def test_only_jobs_that_failed_or_were_cancelled_are_retried(api: JobsApi) -> None:
    job_id = submit(api, "end")
    finished(api, job_id)
    refused = api.http.post(f"{JOBS}/{job_id}/retry")
    assert refused.status_code == 409
    assert refused.json() == {"detail": "the job is completed; only failed and cancelled jobs can be retried"}


# --- processes that are lost ------------------------------------------------------------------------------------------


def test_a_job_whose_process_dies_goes_on_from_its_last_saved_state(api: JobsApi) -> None:
    program = ("start", "step 1 3.0", "save 1", "step 2 2.5", "kill 1", "step 3 2.0", "end")
    job_id = submit(api, *program)
    job = finished(api, job_id)
    assert job["status"] == "completed"
    assert (job["metrics"]["steps"], job["metrics"]["train/loss"]) == ([1, 2, 3], [3.0, 2.5, 2.0])
    first, second = starts(api, job_id)
    assert first["metrics"] == {}
    assert second["metrics"] == {"steps": [1], "train/loss": [3.0], "train/steps": 1}
    assert any("SIGKILL; going on after step 1" in message for message in messages(api, job_id))


def test_a_job_whose_processes_keep_dying_without_progress_fails_with_their_last_words(api: JobsApi) -> None:
    job_id = submit(api, "start", "step 1 3.0", "save 1", "print out of memory", "exit 7")
    job = finished(api, job_id)
    assert job["status"] == "failed"
    assert job["error"] == "worker lost: exit status 7; its last lines: out of memory"
    # The first saved something; the two after it, and the first once more, did not.
    assert len(starts(api, job_id)) == 3


def test_a_job_waits_while_the_database_fails(api: JobsApi, monkeypatch: pytest.MonkeyPatch) -> None:
    issued, failures = RunKeys.issued, [StorageError("no connection")] * 2

    def issued_late(keys: RunKeys, record: JobRecord) -> AbstractAsyncContextManager[IssuedKey | None]:
        if failures:
            raise failures.pop()
        return issued(keys, record)

    monkeypatch.setattr(RunKeys, "issued", issued_late)
    monkeypatch.setattr(runner, "STORAGE_RETRY_SECONDS", 0.01)
    job_id = submit(api, "start", "step 1 3.0", "end")
    assert finished(api, job_id)["status"] == "completed"
    assert (failures, messages(api, job_id)[:2]) == ([], ["queued", "started, attempt 1"])


def test_progress_resets_what_a_job_may_lose(api: JobsApi) -> None:
    program = [word for n in range(1, 6) for word in (f"step {n} 1.0", f"save {n}", f"kill {n}")]
    job_id = submit(api, "start", *program, "end")
    job = finished(api, job_id)
    assert job["status"] == "completed"
    assert job["metrics"]["steps"] == [1, 2, 3, 4, 5]
    assert len(starts(api, job_id)) == 6


# --- how many at once, and whose --------------------------------------------------------------------------------------


def test_no_more_jobs_run_than_allowed_and_the_next_starts_when_one_ends(api: JobsApi) -> None:
    first, second, third = (submit(api, "start", "gate g", "end") for _ in range(3))
    wait_for(api, first, "at gate g")
    wait_for(api, second, "at gate g")
    assert api.get(third).json()["status"] == "queued"
    open_gate(api, second)
    wait_for(api, third, "at gate g")
    assert [api.get(job_id).json()["status"] for job_id in (first, second, third)] == [
        "running",
        "completed",
        "running",
    ]
    for job_id in (first, third):
        open_gate(api, job_id)
        finished(api, job_id)


# --- servers that stop ------------------------------------------------------------------------------------------------


def test_jobs_go_on_after_the_server_stopped(tmp_path: Path) -> None:
    with serve_scripted(tmp_path, max_running=1) as api:
        running = submit(api, "start", "step 1 3.0", "save 1", "step 2 2.0", "gate g", "step 3 1.0", "end")
        waiting = submit(api, "start", "end")
        wait_for(api, running, "at gate g")
        (start,) = starts(api, running)
    with pytest.raises(ProcessLookupError):
        os.kill(start["pid"], 0)
    with serve_scripted(tmp_path, max_running=1) as api:
        before = api.get(running).json()
        assert before["status"] == "running"
        assert before["metrics"]["steps"] == [1, 2]
        assert (
            "the server ended while the job ran; going on after step 1, which was saved, attempt 2"
            in follow_to_gate(api, running)
        )
        open_gate(api, running)
        job = finished(api, running)
        assert job["status"] == "completed"
        assert job["started_at"] == before["started_at"]
        assert (job["metrics"]["steps"], job["metrics"]["train/loss"]) == ([1, 2, 3], [3.0, 2.0, 1.0])
        assert starts(api, running)[1]["metrics"]["steps"] == [1]
        assert finished(api, waiting)["status"] == "completed"
