"""A server with one fake model whose jobs' processes play what the tags of their requests say."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.command import free_port
from tests.jobs.hosting import JOBS, JobsApi, fill_library, job_routes
from tests.serving import serve_in_thread
from tinker_core.engine import Engine, EngineConfig
from tinker_core.engine.clock import Clock
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import BaseModelSpec
from tinker_jobs.service import processes
from tinker_server.app import create_app

SCRIPT = Path(__file__).with_name("scripted_worker.py")


@contextlib.contextmanager
def serve_scripted(
    data_dir: Path, *, max_running: int, key: str | None = None, clock: Clock | None = None
) -> Iterator[JobsApi]:
    """Serve for the length of a block; ``key`` is sent with all requests."""
    plugins = Plugins.load("core", FAKE_PLUGIN, "jobs")
    fill_library(data_dir)
    config = EngineConfig(
        base_models=(BaseModelSpec(name="local/tiny", path="tiny"),),
        data_dir=data_dir,
        backend="fake",
        sampler=None,
        plugins=(FAKE_PLUGIN,),
        options={"jobs-max-running": max_running},
    )
    port = free_port()
    app = create_app(Engine(config, plugins, clock=clock), plugins=plugins, own_url=f"http://127.0.0.1:{port}")
    headers = {} if key is None else {"x-api-key": key}
    with (
        pytest.MonkeyPatch.context() as patch,
        serve_in_thread(app, port=port) as url,
        httpx.Client(base_url=url, timeout=60, headers=headers) as http,
    ):
        patch.setattr(processes, "COMMAND", (sys.executable, "-I", str(SCRIPT)))
        yield JobsApi(url=url, http=http, data_dir=data_dir, routes=job_routes(app))


def submit(api: JobsApi, *program: str, **headers: str) -> str:
    """A new job that does this; its id."""
    created = api.http.post(JOBS, json=request_for(*program), headers=headers)
    assert created.status_code == 201, created.text
    return str(created.json()["id"])


def request_for(*program: str) -> dict[str, Any]:
    reference = {"name": "helper", "version": "1.0.0"}
    config = {"dataset_ref": {"name": "gsm8k", "version": "1.0.0"}}
    kind = {"backend": "tinker", "trainer_type": "sft", "model": "local/tiny"}
    return {**kind, "capability_ref": reference, "config": config, "tags": list(program)}


def follow(api: JobsApi, job_id: str, **headers: str) -> Iterator[dict[str, Any]]:
    """The log as it is written, to the end of the job."""
    with api.http.stream("GET", f"{JOBS}/{job_id}/logs/stream", headers=headers) as stream:
        assert stream.status_code == 200
        name = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: ") and name == "log":
                yield json.loads(line.removeprefix("data: "))


def wait_for(api: JobsApi, job_id: str, message: str, **headers: str) -> None:
    """Return once the log says something."""
    said = []
    for entry in follow(api, job_id, **headers):
        said.append(entry["message"])
        if entry["message"] == message:
            return
    raise AssertionError(f"the job ended without {message!r}: {said}")


def finished(api: JobsApi, job_id: str, **headers: str) -> dict[str, Any]:
    """The job once it has ended."""
    for _ in follow(api, job_id, **headers):
        pass
    job: dict[str, Any] = api.http.get(f"{JOBS}/{job_id}", headers=headers).json()
    return job


def entries(api: JobsApi, job_id: str) -> list[dict[str, Any]]:
    """The whole log."""
    found: list[dict[str, Any]] = api.get(job_id, "/logs").json()["items"]
    return found


def messages(api: JobsApi, job_id: str) -> list[str]:
    return [entry["message"] for entry in entries(api, job_id)]


def starts(api: JobsApi, job_id: str) -> list[dict[str, Any]]:
    """What each of a job's processes knew when it began."""
    return [entry["data"] for entry in entries(api, job_id) if entry["event_type"] == "training_start"]


def open_gate(api: JobsApi, job_id: str, name: str = "g") -> None:
    """Let a process go on that waits at a gate."""
    (api.data_dir / "jobs" / job_id / name).write_bytes(b"")
