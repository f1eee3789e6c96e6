"""What databases differ in is answered alike: odd texts, long ids and large numbers, on SQLite and Postgres."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.server.conftest import Api, open_api

ODD = ["a\0b", "\ufffe", "x" * 5000, "%", "_", "' OR 1=1 --", "é\U0001f600", "\\"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, database_url: str | None) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("data"), engine={"database_url": database_url}) as api:
        yield api


@pytest.mark.parametrize("odd", ODD)
def test_odd_ids_are_unknown_or_refused(api: Api, odd: str) -> None:
    name = quote(odd, safe="")
    for path in (f"sessions/{name}", f"training_runs/{name}", f"samplers/{name}", f"training_runs/{name}/checkpoints"):
        assert api.get(path).status_code in (400, 404), path
    for route, body in (
        ("session_heartbeat", {"session_id": odd}),
        ("weights_info", {"tinker_path": f"tinker://{odd}/weights/x"}),
        ("create_sampling_session", {"session_id": odd, "sampling_session_seq_id": 0, "base_model": "tiny"}),
    ):
        assert api.post(route, body).status_code in (400, 404), route


def test_odd_texts_are_kept_as_they_are_or_refused_by_name(api: Api) -> None:
    for odd in ODD:
        described: dict[str, Any] = {
            "display_name": odd,
            "tags": [odd],
            "user_metadata": {odd: odd},
            "sdk_version": odd,
        }
        made = api.post("create_session", described)
        if "\0" in odd:
            assert made.status_code == 400
            assert "NUL" in made.json()["detail"]
            del described["display_name"], described["sdk_version"]
            made = api.post("create_session", described)
        assert made.status_code == 200, made.text
        session_id = made.json()["session_id"]
        assert api.get(f"sessions/{session_id}").status_code == 200
        found = api.post("sessions/search", {"user_metadata": {odd: odd}}).json()["sessions"]
        assert [session["session_id"] for session in found] == [session_id]
        ended = api.post(
            "client_finish_session", {"session_id": session_id, "reason": {"type": "errored"}, "detail": odd}
        )
        assert ended.status_code in (200, 404), ended.text


def test_ids_of_projects_have_a_length_that_every_database_takes(api: Api) -> None:
    longest = "\U0001f600" * 255
    session_id = api.post("create_session", {"project_id": longest}).json()["session_id"]
    assert api.get(f"sessions/{session_id}").status_code == 200
    refused = api.post("create_session", {"project_id": longest + "x"})
    assert refused.status_code == 400
    assert "255" in refused.json()["detail"]
    for project_id in ("a\0b", "x" * 100_000):
        assert api.post("sessions/search", {"project_ids": [project_id]}).status_code in (200, 400)


@pytest.mark.parametrize("number", [-1, 0, 2**31, 2**63 - 1, 2**63, 10**30])
def test_pages_of_any_size_and_place_are_shown_or_refused(api: Api, number: int) -> None:
    for path in ("sessions", "training_runs", "checkpoints"):
        for name in ("limit", "offset"):
            assert api.get(path, params={name: number}).status_code in (200, 400), (path, name)
