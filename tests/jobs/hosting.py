"""A server with fake models and the service ``jobs`` in the test's own process, and something for jobs to refer to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file
from starlette.applications import Starlette
from starlette.routing import Route

from tests.chaos.command import free_port
from tests.serving import serve_in_thread
from tinker_core.engine import Engine, EngineConfig
from tinker_core.engine.clock import Clock
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import BaseModelSpec
from tinker_jobs.service import checks
from tinker_server.app import create_app

SCOPE = "/api/v1/org/local/ws/default"
JOBS = f"{SCOPE}/training/jobs"


def ref(name: str, version: str = "1.0.0") -> dict[str, str]:
    return {"name": name, "version": version}


_MODEL = "models/tiny"

SFT: dict[str, Any] = {"dataset_ref": ref("gsm8k")}
RL: dict[str, Any] = {"algorithm": "ppo", "prompt_dataset_ref": ref("gsm8k")}
GRPO: dict[str, Any] = {"task_ref": "my-task@1.0.0", "prompt_dataset_ref": ref("gsm8k")}
KINDS = {"sft": ("tinker", "sft", SFT), "rl": ("tinker", "rl", RL), "grpo": ("ray", "rl", GRPO)}
"""Backend, trainer type, and the smallest config."""


def body(kind: str = "sft", config: Mapping[str, Any] | None = None, /, **fields: Any) -> dict[str, Any]:
    """A request; ``config`` is added to the smallest one, where None takes a field away."""
    backend, trainer_type, smallest = KINDS[kind]
    merged = {name: value for name, value in {**smallest, **(config or {})}.items() if value is not None}
    wrapper = {"model": "local/tiny", "capability_ref": ref("helper"), "backend": backend, "trainer_type": trainer_type}
    return {**wrapper, "config": merged, **fields}


@attrs.frozen(kw_only=True)
class JobsApi:
    """The service as raw HTTP."""

    url: str
    http: httpx.Client
    data_dir: Path
    routes: frozenset[tuple[str, str]]
    """Method and path of every route of the service."""

    def create(self, request: object) -> httpx.Response:
        return self.http.post(JOBS, json=request)

    def new(self, kind: str = "sft", config: Mapping[str, Any] | None = None, /, **fields: Any) -> dict[str, Any]:
        created = self.create(body(kind, config, **fields))
        assert created.status_code == 201, created.text
        job: dict[str, Any] = created.json()
        return job

    def get(self, job_id: str, rest: str = "") -> httpx.Response:
        return self.http.get(f"{JOBS}/{job_id}{rest}")

    def report(self, job_id: str, event_type: str, **fields: Any) -> httpx.Response:
        return self.http.post(f"{JOBS}/{job_id}/progress", json={"event_type": event_type, **fields})


def fill_library(data_dir: Path) -> None:
    """One of everything that a job may refer to, and as much of a model as the catalog reads."""
    files = {
        "capabilities/helper/1.0.0/prompt.md": "You are terse.",
        "tasks/my-task/1.0.0/task.yaml": "instruction: Say it.\nverification: {method: flag, hash: 'sha256:00'}\n",
        "tasks/boxed/1.0.0/task.yaml": "verification: {method: env_flag, expected: done}\n",
        "worlds/lab.yaml": (
            "server_url: http://127.0.0.1:1\nauth_token: secret\ngoal: win\n"
            "runtimes:\n  front:\n    capability: helper@1.0.0\n"
        ),
        "capabilities/helper/1.0.0/agents/scout.md": "You scout.",
        f"{_MODEL}/config.json": json.dumps({"model_type": "llama", "max_position_embeddings": 8192}),
        "datasets/gsm8k/1.0.0/train.jsonl": '{"prompt": "1+1?", "answer": "2"}\n',
        **{
            f"datasets/{name}/data.jsonl": '{"prompt": "2+2?", "answer": "4"}\n'
            for name in ("gsm8k-test/1.0.0", "traj/0.1.0", "traj2/0.2.0", "d/1.0.0", "d/1")
        },
    }
    for name, text in files.items():
        path = data_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    save_file({"w": np.zeros((1000, 1500), dtype=np.float32)}, str(data_dir / _MODEL / "model.safetensors"))


def job_routes(app: Starlette) -> frozenset[tuple[str, str]]:
    """Method and path of every route that the service adds to a server."""
    found = [route for route in app.routes if isinstance(route, Route)]
    begins = ("/api/v1/org/", "/api/v1/training/", "/api/v1/user")
    return frozenset(
        (method, route.path)
        for route in found
        if route.path.startswith(begins)
        for method in (route.methods or set()) - {"HEAD"}
    )


def make_app(
    data_dir: Path,
    *plugins: object,
    options: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
    database_url: str | None = None,
    url: str,
) -> Starlette:
    """An app on whose server jobs stay queued, so that nothing but the test moves them on."""
    known = Plugins.load("core", FAKE_PLUGIN, "jobs")
    for number, plugin in enumerate(plugins):
        known.register(plugin, f"test-{number}")
    config = EngineConfig(
        base_models=(
            BaseModelSpec(name="local/tiny", path=str(data_dir / _MODEL)),
            BaseModelSpec(name="local/m", path="m"),
            BaseModelSpec(name="local/smollm2-135m-instruct", path="s"),
            BaseModelSpec(name="frozen", path="f", trainable=False),
            BaseModelSpec(name="silent", path="t", sampleable=False),
        ),
        data_dir=data_dir,
        backend="fake",
        sampler="fake",
        plugins=(FAKE_PLUGIN,),
        agreement_tolerance=1.0,
        options={"jobs-max-running": 0, **(options or {})},
        database_url=database_url,
    )
    return create_app(Engine(config, known, clock=clock), plugins=known, poll_seconds=5.0, own_url=url)


@contextlib.contextmanager
def serve_jobs(
    data_dir: Path,
    *plugins: object,
    options: Mapping[str, Any] | None = None,
    key: str | None = None,
    clock: Clock | None = None,
    database_url: str | None = None,
) -> Iterator[JobsApi]:
    """Serve such an app; ``key`` is sent with all requests."""
    fill_library(data_dir)
    port = free_port()
    app = make_app(
        data_dir, *plugins, options=options, clock=clock, database_url=database_url, url=f"http://127.0.0.1:{port}"
    )
    headers = {} if key is None else {"x-api-key": key}
    with (
        # Its jobs stay queued, so what they would run on need not be there.
        pytest.MonkeyPatch.context() as patch,
        serve_in_thread(app, port=port) as url,
        httpx.Client(base_url=url, timeout=60, headers=headers) as http,
    ):
        patch.setattr(checks, "ray_is_installed", lambda: True)
        yield JobsApi(url=url, http=http, data_dir=data_dir, routes=job_routes(app))
