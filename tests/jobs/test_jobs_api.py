"""The HTTP API of training jobs: what is answered about them, and to whom."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.jobs.hosting import JOBS, SCOPE, JobsApi, body, ref, serve_jobs
from tinker_core.engine.clock import SystemClock
from tinker_core.errors import StorageError
from tinker_jobs.records import JobRecord, LogRecord
from tinker_jobs.service.store import JobStore
from tinker_jobs.service.streaming import KEEP_ALIVE, Following
from tinker_jobs.service.tenancy import Tenancy


@pytest.fixture
def api(jobs_api: JobsApi) -> JobsApi:
    return jobs_api


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_job_says_everything_about_itself(api: JobsApi) -> None:
    before = datetime.now(UTC)
    request = body(name="mine", tags=["a"], project_ref="apollo", run_ref="run-7")
    job = api.create(request).json()
    assert api.get(job["id"]).json() == job
    user = api.http.get("/api/v1/user").json()
    created_at = datetime.fromisoformat(job.pop("created_at"))
    assert created_at.utcoffset() == timedelta(0)
    assert before <= created_at <= datetime.now(UTC)
    assert str(uuid.UUID(job.pop("id")))
    digest = job["capability"].pop("runtime_digest")
    assert digest.startswith("sha256:")
    assert job == {
        "organization_id": api.http.get("/api/v1/org/local").json()["id"],
        "workspace_id": api.http.get(SCOPE).json()["id"],
        "status": "queued",
        "name": "mine",
        "backend": "tinker",
        "trainer_type": "sft",
        "algorithm": None,
        "model": "local/tiny",
        "project_ref": "apollo",
        "run_ref": "run-7",
        "dataset_ref": ref("gsm8k"),
        "trajectory_dataset_refs": [],
        "task_ref": None,
        "world_manifest_id": None,
        "world_runtime_id": None,
        "world_agent_name": None,
        "world_goal": None,
        "prompt_dataset_ref": None,
        "capability": {"artifact_id": None, "name": "helper", "version": "1.0.0"},
        "config": request["config"],
        "metrics": {},
        "artifacts": {},
        "tags": ["a"],
        "error": None,
        "created_by": user["id"],
        "created_by_email": user["email_address"],
        "created_by_user": {
            "id": user["id"], "email": user["email_address"], "username": user["username"], "full_name": None,
        },
        "started_at": None,
        "completed_at": None,
        "cancel_requested_at": None,
    }  # fmt: skip


def test_a_job_says_what_its_references_were_resolved_to(api: JobsApi) -> None:
    job = api.new("rl", {"task_ref": "my-task"})
    assert (job["algorithm"], job["task_ref"], job["prompt_dataset_ref"]) == ("ppo", "my-task@1.0.0", ref("gsm8k"))
    world = {"world_manifest_id": "lab", "world_runtime_id": "front", "world_agent_name": "scout", "world_goal": "win"}
    job = api.new("rl", {"prompt_dataset_ref": None, **world})
    assert {name: job[name] for name in world} == world


def test_a_job_moves_as_its_worker_reports(api: JobsApi) -> None:
    job_id = api.new()["id"]
    job = api.report(job_id, "training_start").json()
    assert job["status"] == "running"
    assert job["started_at"] is not None
    for step, loss in ((1, 2.0), (2, 1.5)):
        api.report(job_id, "step_complete", metrics={"steps": [step], "train/loss": [loss], "train/loss_last": loss})
    job = api.report(job_id, "checkpoint_saved", artifacts={"latest_checkpoint": "tinker://x"}).json()
    assert job["metrics"] == {"steps": [1, 2], "train/loss": [2.0, 1.5], "train/loss_last": 1.5}
    assert api.get(job_id, "/artifacts").json() == {"artifacts": {"latest_checkpoint": "tinker://x"}}
    job = api.report(job_id, "training_end", metrics={"steps": [1, 2], "train/loss": [2.0, 1.5]}).json()
    assert (job["status"], job["metrics"]["train/loss"]) == ("completed", [2.0, 1.5])
    assert job["completed_at"] >= job["started_at"]
    assert api.report(job_id, "training_error", error="late").json()["status"] == "completed"


def test_a_worker_may_report_a_failure(api: JobsApi) -> None:
    job = api.report(api.new()["id"], "training_error", level="error", error="boom").json()
    assert (job["status"], job["error"]) == ("failed", "boom")


@pytest.mark.parametrize(
    ("report", "place"),
    [
        ({}, "event_type"),
        ({"event_type": "cancelled"}, "event_type"),
        ({"event_type": "training_start", "progress": 1}, "progress"),
        ({"event_type": "training_start", "level": "loud"}, "level"),
        ({"event_type": "step_complete", "metrics": {"steps": [1, 2], "train/loss": [1.0]}}, "metrics"),
        ({"event_type": "step_complete", "metrics": {"steps": "1"}}, "metrics"),
        ({"event_type": "step_complete", "metrics": {"train/loss": [[1.0]]}}, "metrics"),
    ],
)
def test_a_report_that_makes_no_sense_is_refused(api: JobsApi, report: dict[str, Any], place: str) -> None:
    refused = api.http.post(f"{JOBS}/{api.new()['id']}/progress", json=report)
    assert refused.status_code == 422, refused.text
    assert refused.json()["detail"][0]["loc"] == ["body", place]


def test_a_report_that_could_not_be_kept_counts_once_when_it_is_sent_again(
    api: JobsApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = JobStore.append

    async def fail(*_: object) -> None:
        monkeypatch.setattr(JobStore, "append", append)
        raise StorageError("no connection")

    job_id = api.new()["id"]
    api.report(job_id, "training_start")
    monkeypatch.setattr(JobStore, "append", fail)
    answers = [api.report(job_id, "step_complete", metrics={"x": [1.0]}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [500, 200]
    assert api.get(job_id).json()["metrics"] == {"x": [1.0]}


def test_a_queued_job_is_cancelled_at_once_and_can_be_retried(api: JobsApi) -> None:
    job_id = api.new()["id"]
    job = api.http.post(f"{JOBS}/{job_id}/cancel").json()
    assert job["status"] == "cancelled"
    assert job["completed_at"] is not None
    again = api.http.post(f"{JOBS}/{job_id}/cancel")
    assert again.status_code == 409
    assert isinstance(again.json()["detail"], str)
    job = api.http.post(f"{JOBS}/{job_id}/retry").json()
    assert (job["id"], job["status"], job["completed_at"]) == (job_id, "queued", None)
    assert api.http.post(f"{JOBS}/{job_id}/retry").status_code == 409


def test_a_worker_learns_what_a_job_is_about(api: JobsApi) -> None:
    recipe = {"name": "task_verifier_v1", "params": {"reward_if_true": 2.0}}
    recorded = {"trajectory_dataset_refs": [ref("traj", "0.1.0")]}
    job_id = api.new("rl", {"task_ref": "my-task", "reward_recipe": recipe, **recorded})["id"]
    assert api.get(job_id, "/rl-context").json() == {
        "capability_entry_prompt": "You are terse.",
        "task": {
            "id": "my-task@1.0.0",
            "reference": "my-task@1.0.0",
            "name": "my-task",
            "version": "1.0.0",
            "instruction": "Say it.",
            "ports": None,
            "verification": {"method": "flag", "hash": "sha256:00"},
            "solution": None,
            "sandbox_provider": "none",
            "s3_key": "",
        },
        "world": None,
        "sampled_trajectory_dataset_ref": "traj@0.1.0",
        "reward_recipe": recipe,
    }
    world = api.new("rl", {"prompt_dataset_ref": None, "world_manifest_id": "lab"})
    context = api.get(world["id"], "/rl-context")
    assert context.json()["world"]["server_url"] == "http://127.0.0.1:1"
    assert "secret" not in context.text


@pytest.mark.parametrize("job_id", ["nope", "00000000-0000-4000-8000-000000000000", "%00", "x" * 300, "%F0%9F%98%80"])
def test_a_job_that_does_not_exist_is_not_found(api: JobsApi, job_id: str) -> None:
    for method, rest in (("GET", ""), ("POST", "/cancel"), ("POST", "/retry"), ("GET", "/logs"), ("GET", "/files/x")):
        answer = api.http.request(method, f"{JOBS}/{job_id}{rest}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "Training job not found"})


# --- listing ----------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_newest_first_by_page_and_filter(api: JobsApi) -> None:
    def ids(**query: Any) -> tuple[list[str], int]:
        listed = api.http.get(JOBS, params={"project_ref": "listed", **query})
        assert listed.status_code == 200, listed.text
        return [job["id"] for job in listed.json()["items"]], listed.json()["total"]

    nothing = {"items": [], "total": 0, "page": 1, "page_size": 20}
    assert api.http.get(JOBS, params={"project_ref": "listed"}).json() == nothing
    first = api.new()["id"]
    sft, rl, grpo, other = (api.new(kind, project_ref="listed")["id"] for kind in ("sft", "rl", "grpo", "sft"))
    api.http.post(f"{JOBS}/{rl}/cancel")
    assert ids() == ([other, grpo, rl, sft], 4)
    assert ids(page=2, page_size=3) == ([sft], 4)
    assert ids(page=3, page_size=3) == ([], 4)
    assert ids(status="cancelled") == ([rl], 1)
    assert ids(status="pending") == ([], 0)
    assert ids(backend="ray") == ([grpo], 1)
    assert ids(trainer_type="rl", backend="tinker") == ([rl], 1)
    every = api.http.get(JOBS, params={"page_size": 5}).json()
    assert [job["id"] for job in every["items"]] == [other, grpo, rl, sft, first]
    assert every["total"] > 4


@pytest.mark.parametrize(
    "query",
    [
        {"page": 0}, {"page": "x"}, {"page": 10**20}, {"page_size": 0}, {"page_size": 101}, {"status": "done"},
        {"backend": "slurm"}, {"trainer_type": "dpo"}, {"project_ref": "a\0"}, {"per_page": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_listing_by_what_there_is_not_is_refused(api: JobsApi, query: dict[str, Any]) -> None:
    refused = api.http.get(JOBS, params=query)
    assert refused.status_code == 422, refused.text
    assert refused.json()["detail"][0]["loc"] == ["query", *query]


# --- logs -------------------------------------------------------------------------------------------------------------


def test_a_log_is_read_from_any_line(api: JobsApi) -> None:
    job_id = api.new()["id"]
    api.report(job_id, "training_start", message="begin", level="debug", data={"lr": 1e-4})
    api.report(job_id, "step_complete", metrics={"steps": [1], "train/loss": [2.0]})
    lines = api.get(job_id, "/logs").json()["items"]
    assert [line["message"] for line in lines[-2:]] == ["begin", "step complete"]
    assert lines[-2]["level"] == "debug"
    assert (lines[-2]["data"], lines[-2]["event_type"]) == ({"lr": 1e-4}, "training_start")
    assert lines[-1]["metrics"] == {"steps": [1], "train/loss": [2.0]}
    assert datetime.fromisoformat(lines[-1]["timestamp"]).utcoffset() == timedelta(0)
    numbers = [line["number"] for line in lines]
    assert numbers == sorted(set(numbers))
    assert api.get(job_id, f"/logs?after={numbers[-2]}").json()["items"] == lines[-1:]
    assert api.get(job_id, f"/logs?after={numbers[-1]}").json()["items"] == []
    assert api.get(job_id, "/logs?after=-1").status_code == 422


def events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Server-sent events; comments are left out."""
    event: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line == "" and event:
            yield event
            event = {}
        elif name:
            event[name] = value


def test_a_log_is_followed_to_the_end_of_its_job(api: JobsApi) -> None:
    job_id = api.new()["id"]
    with api.http.stream("GET", f"{JOBS}/{job_id}/logs/stream") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        following = events(stream.iter_lines())
        told: list[dict[str, str]] = []

        def wait_for(name: str, text: str) -> dict[str, Any]:
            for event in following:
                told.append(event)
                if event["event"] == name and text in event["data"]:
                    found: dict[str, Any] = json.loads(event["data"])
                    return found
            raise AssertionError(f"the stream ended without {text!r}")

        api.report(job_id, "training_start", message="begin")
        assert wait_for("log", "begin")["event_type"] == "training_start"
        api.report(job_id, "step_complete", message="step one", metrics={"steps": [1], "train/loss": [2.0]})
        line = wait_for("log", "step one")
        api.report(job_id, "training_end", message="the end")
        job = wait_for("status", "completed")
        assert job == api.get(job_id).json()
        assert next(following, None) is None
    logged = [json.loads(event["data"]) for event in told if event["event"] == "log"]
    assert logged == api.get(job_id, "/logs").json()["items"]
    assert [int(event["id"]) for event in told if event["event"] == "log"] == [item["number"] for item in logged]

    def rest(query: str = "", **headers: str) -> list[str]:
        answer = api.http.get(f"{JOBS}/{job_id}/logs/stream{query}", headers=headers)
        found = [event for event in events(iter(answer.text.split("\n"))) if event["event"] == "log"]
        return [json.loads(event["data"])["message"] for event in found]

    behind = [item["message"] for item in logged if item["number"] > line["number"]]
    assert behind[-1] == "the end"
    assert rest(f"?after={line['number']}") == behind
    assert rest("?after=0", **{"last-event-id": str(line["number"])}) == behind


def test_a_stream_goes_on_only_after_an_event_of_its_own(api: JobsApi) -> None:
    job_id = api.new()["id"]
    for last in ("x", "-1", "9" * 30):
        refused = api.http.get(f"{JOBS}/{job_id}/logs/stream", headers={"last-event-id": last})
        assert refused.status_code == 422
        assert refused.json()["detail"][0]["loc"] == ["header", "last-event-id"]
    assert api.http.head(f"{JOBS}/{job_id}/logs/stream").status_code == 200


def test_a_server_that_stops_ends_its_streams(tmp_path: Path) -> None:
    with contextlib.ExitStack() as serving, ThreadPoolExecutor() as pool, httpx.Client(timeout=60) as http:
        api = serving.enter_context(serve_jobs(tmp_path))
        with http.stream("GET", f"{api.url}{JOBS}/{api.new()['id']}/logs/stream") as stream:
            following = events(stream.iter_lines())
            next(following)
            stopped = pool.submit(serving.close)
            # To its end, which a connection that is cut off does not have.
            assert [event for event in following if event["event"] == "status"] == []
        stopped.result()


class ImpatientClock(SystemClock):
    """Whatever is waited for does not come in time, for a number of times."""

    def __init__(self, times: int, then: asyncio.Event) -> None:
        self.times = times
        self._then = then

    async def wait(self, event: asyncio.Event, deadline: float | None) -> None:
        assert deadline is not None
        if self.times == 0:
            self._then.set()
            await event.wait()
        else:
            self.times -= 1


def test_a_quiet_stream_is_kept_alive() -> None:
    async def collect() -> list[bytes]:
        arrived = asyncio.Event()

        async def news() -> AsyncIterator[LogRecord | JobRecord]:
            await arrived.wait()
            yield LogRecord(number=5, timestamp=datetime(2026, 1, 1, tzinfo=UTC), level="info", message="m", data={})

        async def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
            return await coroutine

        following = Following(
            clock=ImpatientClock(3, arrived),
            tenancy=Tenancy(organization="local", workspace="default"),
            until_stopping=run,
        )
        return [chunk async for chunk in following.events(news())]

    chunks = asyncio.run(collect())
    assert chunks[:3] == [KEEP_ALIVE] * 3
    assert chunks[3].startswith(b"id: 5\nevent: log\ndata: {")
    assert len(chunks) == 4


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(api: JobsApi) -> tuple[str, Path]:
    """A job, and its folder of files."""
    job_id = api.new()["id"]
    found = [path for path in api.data_dir.rglob(job_id) if path.is_dir()]
    directory = found[0] if found else api.data_dir / "jobs" / job_id
    (directory / "files").mkdir(parents=True, exist_ok=True)
    return job_id, directory / "files"


@pytest.mark.parametrize(
    ("name", "kind"), [("loss.png", "image/png"), ("loss.svg", "image/svg+xml"), ("x", "application/octet-stream")]
)
def test_a_file_of_a_job_is_sent_as_what_it_is(api: JobsApi, files: tuple[str, Path], name: str, kind: str) -> None:
    job_id, folder = files
    (folder / name).write_bytes(b"\x89drawn")
    sent = api.get(job_id, f"/files/{name}")
    assert (sent.status_code, sent.content, sent.headers["content-type"]) == (200, b"\x89drawn", kind)
    assert sent.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in sent.headers["content-security-policy"]


@pytest.mark.parametrize(
    "name", ["none.png", "..%2fworker.log", "%2e%2e", "%00", "link", "folder", "folder%2finner", "a%5cb"]
)
def test_nothing_else_of_a_job_is_sent(api: JobsApi, files: tuple[str, Path], name: str) -> None:
    job_id, folder = files
    (folder.parent / "worker.log").write_text("secret")
    (folder / "link").symlink_to(folder.parent / "worker.log")
    (folder / "folder").mkdir()
    (folder / "folder" / "inner").write_text("secret")
    refused = api.get(job_id, f"/files/{name}")
    assert refused.status_code == 404, refused.text
    assert "secret" not in refused.text
