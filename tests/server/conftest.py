from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from tests.postgres import Postgres
from tests.serving import serve_in_thread
from tinker_core.engine import Engine, EngineConfig
from tinker_core.engine.clock import Clock
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import BaseModelSpec
from tinker_server.app import create_app
from tinker_server.limits import Limits

CAPTURES = [
    json.loads(line) for line in (Path(__file__).parent / "captures" / "main_flow.jsonl").read_text().splitlines()
]


@attrs.frozen(kw_only=True)
class Api:
    """The server's API as raw HTTP."""

    url: str
    http: httpx.Client

    def post(self, path: str, body: object = None, **kwargs: Any) -> httpx.Response:
        if body is not None:
            kwargs["content"] = json.dumps(body)
            kwargs.setdefault("headers", {})["content-type"] = "application/json"
        return self.http.post(f"/api/v1/{path}", **kwargs)

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.http.get(f"/api/v1/{path}", **kwargs)

    def session(self) -> str:
        return str(self.post("create_session", {"tags": [], "sdk_version": "0"}).json()["session_id"])

    def retrieve(self, request_id: str, accept: str = "application/json") -> httpx.Response:
        while True:
            response = self.post("retrieve_future", {"request_id": request_id}, headers={"accept": accept})
            if response.status_code != 408:
                return response

    def run(self, path: str, body: object = None, **kwargs: Any) -> dict[str, Any]:
        """Submit, expect a receipt, and return the JSON result."""
        submitted = self.post(path, body, **kwargs)
        assert submitted.status_code == 200, submitted.text
        result: dict[str, Any] = self.retrieve(submitted.json()["request_id"]).json()
        return result

    def model(self, session_id: str, model_seq_id: int = 0, **fields: Any) -> str:
        body = {"session_id": session_id, "model_seq_id": model_seq_id, "base_model": "tiny"}
        result = self.run("create_model", {**body, "lora_config": {"rank": 4}, **fields})
        return str(result["model_id"])


@contextlib.contextmanager
def open_api(
    data_dir: Path,
    *,
    sampler: object = None,
    clock: Clock | None = None,
    port: int = 0,
    engine: Mapping[str, Any] | None = None,
    more_plugins: Mapping[str, object] | None = None,
    **settings: Any,
) -> Iterator[Api]:
    """A server with fake models; ``sampler`` replaces the fake one, ``settings`` go to the app."""
    plugins = Plugins.load("core", FAKE_PLUGIN)
    for name, plugin in (more_plugins or {}).items():
        plugins.register(plugin, name)
    if sampler is not None:
        plugins.register(sampler, "held")
    config = EngineConfig(
        base_models=(BaseModelSpec(name="tiny", path="tiny"),),
        data_dir=data_dir,
        backend="fake",
        sampler="fake" if sampler is None else "held",
        plugins=(FAKE_PLUGIN,),
        # Samplers of tests make up their answers.
        **{"agreement_tolerance": 1.0 if sampler is None else 0.0, **(engine or {})},
    )
    settings = {"poll_seconds": 5.0, "limits": Limits(body_limit=8 * 1024 * 1024), **settings}
    app = create_app(Engine(config, plugins, clock=clock), plugins=plugins, **settings)
    with serve_in_thread(app, port=port) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield Api(url=url, http=http)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("data")) as api:
        yield api


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """Of an empty control database, of each kind; None is the one in the data directory."""
    if request.param == "sqlite":
        return None
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.database()
