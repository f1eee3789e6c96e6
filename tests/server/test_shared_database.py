"""Two servers, each with its own data directory, on one control database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import httpx
import pytest

from tests.server.conftest import Api, open_api
from tests.server.tenants import make_key
from tinker_core.engine import Engine, EngineConfig
from tinker_core.errors import ConfigurationError
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import BaseModelSpec


@attrs.frozen
class Two:
    first: Api
    second: Api


@pytest.fixture
def two(tmp_path: Path, database: str) -> Iterator[Two]:
    key, _ = make_key(tmp_path, "ann", url=database)
    with ExitStack() as stack:
        apis = []
        for name in ("first", "second"):
            api = stack.enter_context(open_api(tmp_path / name, engine={"database_url": database}))
            http = stack.enter_context(httpx.Client(base_url=api.url, timeout=60, headers={"x-api-key": key}))
            apis.append(Api(url=api.url, http=http))
        yield Two(*apis)


def save(api: Api, name: str) -> str:
    model_id = api.model(api.session())
    return str(api.run("save_weights", {"model_id": model_id, "path": name, "seq_id": 1})["path"])


def listed(api: Api) -> set[str]:
    return {checkpoint["tinker_path"] for checkpoint in api.get("checkpoints").json()["checkpoints"]}


def test_both_show_all_records_and_each_works_for_its_own_sessions_and_files_only(two: Two) -> None:
    paths = {save(two.first, "one"), save(two.second, "two")}
    assert listed(two.first) == listed(two.second) == paths
    session_id = two.first.session()
    assert two.second.get(f"sessions/{session_id}").status_code == 200
    for route, body in (
        ("session_heartbeat", {"session_id": session_id}),
        ("create_sampling_session", {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}),
    ):
        refused = two.second.post(route, body)
        assert refused.status_code == 400
        assert "belongs to another server" in refused.json()["detail"]
    path = next(path for path in paths if path.endswith("one"))
    model_id = two.second.model(two.second.session())
    failed = two.second.run("load_weights", {"model_id": model_id, "path": path, "seq_id": 1, "optimizer": False})
    assert "with another server" in failed["error"]
    removed = path.removeprefix("tinker://").replace("/", "/checkpoints/", 1)
    assert two.second.http.delete(f"/api/v1/training_runs/{removed}").is_success
    assert listed(two.first) == listed(two.second) == paths - {path}


def test_a_data_directory_refuses_another_control_database(tmp_path: Path) -> None:
    async def start(url: str) -> None:
        config = EngineConfig(
            base_models=(BaseModelSpec(name="tiny", path="tiny"),),
            data_dir=tmp_path / "data",
            backend="fake",
            sampler=None,
            plugins=(FAKE_PLUGIN,),
            database_url=url,
        )
        async with Engine(config, Plugins.load("core", FAKE_PLUGIN)):
            pass

    own, other = (f"sqlite:///{tmp_path / name}.sqlite" for name in ("own", "other"))
    asyncio.run(start(own))
    with pytest.raises(ConfigurationError, match=r"used with another control database.*srv-.*database copy"):
        asyncio.run(start(other))
    asyncio.run(start(own))


def test_a_server_restored_with_its_own_database_is_the_same_server(tmp_path: Path) -> None:
    with open_api(tmp_path) as api:
        path = save(api, "one")
    server_id = (tmp_path / "server-id").read_text()
    (tmp_path / "server-id").unlink()
    with open_api(tmp_path) as api:
        model_id = api.model(api.session())
        assert api.run("load_weights", {"model_id": model_id, "path": path, "seq_id": 1, "optimizer": False})["path"]
    assert (tmp_path / "server-id").read_text() == server_id
