"""Sessions through the unmodified SDK's REST client, with fake models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tinker
from tinker import types

from tests.server.conftest import Api, open_api


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, database_url: str | None) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("data"), engine={"database_url": database_url}) as api:
        yield api


@pytest.fixture
def rest(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.RestClient]:
    monkeypatch.setenv("TINKER_API_KEY", "tml-dummy")
    with tinker.ServiceClient(base_url=api.url):
        yield tinker.RestClient(base_url=api.url)


def found_by(rest: tinker.RestClient, **conditions: Any) -> types.SessionSearchResponse:
    with pytest.warns(tinker.ExperimentalWarning):
        return rest.search_sessions(types.SessionSearchRequest(**conditions)).result()


def test_a_session_is_listed_found_and_moved(api: Api, rest: tinker.RestClient) -> None:
    api.session()
    described: dict[str, Any] = {"user_metadata": {"run": "search"}, "display_name": "Blue Whale", "project_id": "sea"}
    with tinker.ServiceClient(base_url=api.url, **described) as service:
        model = service.create_lora_training_client(base_model="tiny", rank=4).result()
        path = model.save_state("a").result().path
        session_id = model.model_id.partition(":")[0]
        assert session_id in rest.list_sessions(access_scope="accessible").result().sessions
        session = rest.get_session(session_id).result()
        assert (session.training_run_ids, session.display_name) == ([model.model_id], "Blue Whale")
        (summary,) = found_by(rest, display_name="whale", statuses=[types.ActiveSessionStatusQuery()]).sessions
        assert summary.project_id == "sea"
        rest.assign_session_project(session_id, "ocean").result()
    conditions: dict[str, Any] = {"user_metadata": {"run": "search"}, "project_ids": ["ocean"]}
    page = found_by(rest, **conditions, limit=1)
    (summary,) = page.sessions
    assert page.next_cursor is None
    assert summary.session_id == session_id
    assert isinstance(summary.status, types.ClientSessionFinished)
    assert summary.status.reason.type == "success"
    (checkpoint,) = rest.list_checkpoints(model.model_id).result().checkpoints
    assert (checkpoint.tinker_path, checkpoint.size_bytes) == (path, summary.checkpoint_storage_bytes)
    (run,) = rest.list_training_runs(project_id="ocean").result().training_runs
    assert run.training_run_id == model.model_id
    assert found_by(rest, project_ids=["sea"]).sessions == []
    assert found_by(rest, owner=types.UserSearchOwner(owner_urns=["somebody"])).sessions == []
    for owner in ("local", "tml:organization_user:local"):
        assert found_by(rest, owner=types.UserSearchOwner(owner_urns=[owner])).sessions
    first = found_by(rest, owner=types.AccessibleSearchOwner(), limit=1)
    assert first.next_cursor is not None
    second = found_by(rest, cursor=first.next_cursor, limit=200)
    assert first.sessions[0].session_id not in {session.session_id for session in second.sessions}


def test_searches_that_cannot_be_meant_are_refused(api: Api) -> None:
    wrongs: tuple[dict[str, Any], ...] = (
        {"limit": 0},
        {"limit": 201},
        {"statuses": []},
        {"statuses": [{"type": "odd"}]},
        {"statuses": [{"type": "client_finished", "reasons": ["odd"]}]},
        {"owner": {"type": "user"}},
        {"owner": {"type": "everybody"}},
        {"cursor": {"last_created_at": "now", "last_session_id": "x"}},
        {"cursor": {"last_created_at": "2026-01-01", "last_session_id": "x"}},
        {"user_metadata": {"a": 1}},
        {"display_name": ""},
    )
    for wrong in wrongs:
        assert api.post("sessions/search", wrong).status_code == 400, wrong
    session_id = api.session()
    for body in (b"{}", b'{"project_id": ""}'):
        assert api.http.put(f"/api/v1/sessions/{session_id}/project", content=body).status_code == 400
    assert api.http.put("/api/v1/sessions/s-x/project", content=b'{"project_id": "p"}').status_code == 404
    assert api.get("sessions", params={"access_scope": "all"}).status_code == 400
