"""Real jobs whose process, or whose server, is killed: they go on, and end as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import httpx
import pytest

from tests.chaos.command import Command
from tests.chaos.tree import kill, wait_gone
from tests.jobs.hosting import JOBS, JobsApi, fill_library
from tests.jobs.scripted import follow
from tests.jobs.supervised import sums
from tests.models import write_tiny_model
from tests.processes import children_of
from tests.server.tenants import make_key
from tinker_core.storage import ControlStore, database_url
from tinker_core.types import ApiKeyRecord

WORKER = "tinker_jobs.worker"
CRASH_STEP = 6
"""Two steps after a checkpoint."""


@attrs.frozen(kw_only=True)
class Place:
    """A server that is started again whenever it ends."""

    command: Command
    api: JobsApi
    model: str

    def submit(self) -> str:
        config = {
            "dataset_ref": {"name": "sums", "version": "1.0.0"},
            "eval_dataset_ref": {"name": "sums", "version": "1.0.0"},
            "steps": 10,
            "batch_size": 4,
            "checkpoint_interval": 4,
            "lora_rank": 4,
            "learning_rate": 0.01,
        }
        return str(self.api.new("sft", config, model=self.model)["id"])

    def workers(self) -> list[int]:
        """The processes of jobs."""
        found = self.command.tree()
        parents = () if found is None else (found.supervisor, *found.server)
        return [pid for parent in parents for pid, words in children_of(parent).items() if WORKER in words]

    def finished(self, job_id: str) -> dict[str, Any]:
        for _ in follow(self.api, job_id):
            pass
        job: dict[str, Any] = self.api.get(job_id).json()
        assert job["status"] == "completed", job["error"]
        return job

    def keys_of(self, job_id: str) -> list[ApiKeyRecord]:
        async def read() -> list[ApiKeyRecord]:
            control = await ControlStore.open(database_url(self.api.data_dir))
            try:
                return await control.keys.list()
            finally:
                await control.close()

        return [record for record in asyncio.run(read()) if record.name == f"training job {job_id}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("crashes")
    data_dir = root / "data"
    model = str(write_tiny_model(root / "llama", "llama", tie=True, max_context=512))
    fill_library(data_dir)
    rows = data_dir / "datasets" / "sums" / "1.0.0" / "data.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in sums(24)))
    key, _ = make_key(data_dir, "ann")
    flags = ("--base-model", model, "--backend", "fsdp", "--deterministic")
    with Command(*flags, data_dir=data_dir, log=root / "log") as command:
        command.wait_ready()
        with httpx.Client(base_url=command.url, timeout=60, headers={"x-api-key": key}) as http:
            api = JobsApi(url=command.url, http=http, data_dir=data_dir, routes=frozenset())
            yield Place(command=command, api=api, model=model)


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> dict[str, Any]:
    """The job when nothing happens to it."""
    return place.finished(place.submit())


def kill_worker(place: Place) -> None:
    (worker,) = place.workers()
    kill([worker])


def kill_server(place: Place) -> None:
    place.command.forget_ready()
    assert place.command.kill("server")
    place.command.wait_ready()


def kill_everything(place: Place) -> None:
    place.command.forget_ready()
    assert place.command.kill("all")
    place.command.wait_ready()


@pytest.mark.slow
@pytest.mark.parametrize("crash", [kill_worker, kill_server, kill_everything])
def test_a_job_ends_with_the_same_metrics_after_a_crash(
    place: Place, undisturbed: dict[str, Any], crash: Callable[[Place], None]
) -> None:
    job_id = place.submit()
    for entry in follow(place.api, job_id):
        if entry["metrics"].get("steps") == [CRASH_STEP]:
            break
    (worker,) = place.workers()
    crash(place)
    assert wait_gone([worker], 20) == []
    job = place.finished(job_id)
    assert job["metrics"] == undisturbed["metrics"]
    assert job["metrics"]["steps"] == list(range(1, 11))
    assert wait_gone(place.workers(), 30) == []
    assert place.command.orphans == []
    lines = place.api.get(job_id, "/logs").json()["items"]
    (resumed,) = [line for line in lines if line["event_type"] == "resumed"]
    # The job went on until it was killed, and may have saved once more.
    assert resumed["data"]["attempt"] == 2
    assert resumed["data"]["step"] in (4, 8, 10)
    first, second = place.keys_of(job_id)
    assert first.revoked_at is not None
    assert second.revoked_at is None or second.revoked_at > first.revoked_at
    assert place.api.http.get(JOBS).json()["items"][0]["id"] == job_id
