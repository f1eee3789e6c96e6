"""Hostile requests to every route of the service ``jobs``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.asgi import Hosted, host
from tests.hostile.conftest import SECRET
from tests.hostile.examples import PARAMETERS, Endpoint
from tests.hostile.strategies import calls
from tests.jobs.hosting import JOBS, body, fill_library, job_routes, make_app

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "12"))
URL = "http://127.0.0.1:1"


def routes() -> list[Endpoint]:
    """The routes of an app that is never started."""
    return [Endpoint(path=path, methods=(method,)) for method, path in sorted(job_routes(make_app(Path("x"), url=URL)))]


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    root = tmp_path_factory.mktemp("hostile-jobs")
    (root / "canary.txt").write_text(SECRET)
    fill_library(root / "data")
    with host(make_app(root / "data", url=URL)) as hosted:
        yield hosted


@pytest.mark.parametrize("endpoint", routes(), ids=str)
def test_no_request_breaks_the_service(hosted: Hosted, endpoint: Endpoint) -> None:
    assert set(endpoint.parameters) <= PARAMETERS.keys(), f"{endpoint}: give its path parameters good values"
    job_id = hosted.post(JOBS.removeprefix("/api/v1/"), body()).json()["id"]
    if endpoint.path.endswith("/stream"):
        # Whoever follows a job waits for its end.
        assert hosted.post(f"{JOBS.removeprefix('/api/v1/')}/{job_id}/cancel", {}).status == 200

    @settings(max_examples=EXAMPLES)
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        answer = hosted.send(data.draw(calls(endpoint, {"JOB": job_id})))
        assert SECRET.encode() not in answer.body

    attack()


def test_the_service_works_after_all_that(hosted: Hosted) -> None:
    created = hosted.post(JOBS.removeprefix("/api/v1/"), body())
    assert created.status == 201
    assert hosted.get(f"{JOBS.removeprefix('/api/v1/')}/{created.json()['id']}").json() == created.json()
