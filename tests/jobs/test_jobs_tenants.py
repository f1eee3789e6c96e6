"""Two owners on one server: what one submits does not exist for the other."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import attrs
import httpx
import pytest

from tests.jobs.hosting import JOBS, JobsApi, body, serve_jobs
from tests.server.conftest import Api
from tests.server.tenants import make_key

JOB = "/api/v1/org/{organization}/ws/{workspace}/training/jobs/{job_id}"
PROBES = {
    ("GET", ""): None,
    ("GET", "/logs"): None,
    ("GET", "/logs/stream"): None,
    ("GET", "/artifacts"): None,
    ("GET", "/files/{name}"): None,
    ("GET", "/rl-context"): None,
    ("POST", "/cancel"): None,
    ("POST", "/retry"): None,
    ("POST", "/progress"): {"event_type": "training_error", "error": "harm"},
}
"""Method and rest of the path of every route that names a job -> a body."""
NAMES_NO_JOB = {
    ("GET", "/api/v1/user"),
    ("GET", "/api/v1/training/catalog"),
    ("GET", "/api/v1/org/{organization}"),
    ("GET", "/api/v1/org/{organization}/ws"),
    ("GET", "/api/v1/org/{organization}/ws/{workspace}"),
    ("GET", "/api/v1/org/{organization}/ws/{workspace}/projects"),
    ("GET", "/api/v1/org/{organization}/ws/{workspace}/projects/{project}"),
    ("GET", "/api/v1/org/{organization}/ws/{workspace}/training/jobs"),
    ("POST", "/api/v1/org/{organization}/ws/{workspace}/training/jobs"),
}


@attrs.frozen
class Tenants:
    ann: JobsApi
    ben: JobsApi
    job: dict[str, Any]
    """Ann's."""


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    data_dir = tmp_path_factory.mktemp("tenants")
    (key, _), (other, _) = (make_key(data_dir, owner) for owner in ("ann", "ben"))
    with (
        serve_jobs(data_dir, key=key) as ann,
        httpx.Client(base_url=ann.url, timeout=60, headers={"x-api-key": other}) as http,
    ):
        yield Tenants(ann, attrs.evolve(ann, http=http), ann.new(name="of ann"))


def test_all_routes_are_tried(tenants: Tenants) -> None:
    """A new route needs a probe here, or a place in the set of those with nothing to probe."""
    assert tenants.ann.routes == {(method, JOB + rest) for method, rest in PROBES} | NAMES_NO_JOB


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: f"{probe[0]} {probe[1]}")
def test_anothers_job_is_as_good_as_made_up(tenants: Tenants, probe: tuple[str, str]) -> None:
    method, rest = probe

    def outcome(job_id: str) -> tuple[int, str, str]:
        path = f"{JOBS}/{job_id}{rest.format(name='plot.svg')}"
        answer = tenants.ben.http.request(method, path, json=PROBES[probe])
        return answer.status_code, answer.headers["content-type"], answer.text

    assert outcome(tenants.job["id"]) == outcome(str(uuid.uuid4()))
    assert outcome(tenants.job["id"])[0] == 404
    assert tenants.ann.get(tenants.job["id"]).json() == tenants.job


def test_a_listing_shows_ones_own_jobs(tenants: Tenants) -> None:
    mine = tenants.ben.new(name="of ben")
    assert [job["id"] for job in tenants.ben.http.get(JOBS).json()["items"]] == [mine["id"]]
    assert [job["id"] for job in tenants.ann.http.get(JOBS).json()["items"]] == [tenants.job["id"]]
    assert mine["created_by_user"]["username"] == tenants.ben.http.get("/api/v1/user").json()["username"] == "ben"
    assert mine["created_by"] != tenants.job["created_by"]
    assert mine["organization_id"] == tenants.job["organization_id"]


def test_a_request_without_a_key_learns_nothing(tenants: Tenants) -> None:
    for path in (JOBS, f"{JOBS}/{tenants.job['id']}", "/api/v1/user", "/api/v1/training/catalog"):
        assert httpx.get(f"{tenants.ann.url}{path}").status_code == 401


def test_a_job_may_go_on_from_ones_own_checkpoint_only(tenants: Tenants) -> None:
    api = Api(url=tenants.ann.url, http=tenants.ann.http)
    model = api.run(
        "create_model",
        {"session_id": api.session(), "model_seq_id": 0, "base_model": "local/tiny", "lora_config": {"rank": 4}},
    )["model_id"]
    path = api.run("save_weights", {"model_id": model, "seq_id": 1, "path": "w"})["path"]
    abroad = api.run("save_weights_external", {"model_id": model, "seq_id": 2, "path": "e"})["path"]
    job = tenants.ann.new("rl", {"lora_rank": 4}, model=path)
    assert job["model"] == path

    def refusal(tenant: JobsApi, **request: Any) -> dict[str, Any]:
        refused = tenant.create(body(**request))
        assert refused.status_code == 422, refused.text
        found: dict[str, Any] = refused.json()["detail"][0]
        return found

    other = path.replace(model, "made-up")
    found, made_up = (refusal(tenants.ben, model=guess) for guess in (path, other))
    assert found == {**made_up, "msg": made_up["msg"].replace(other, path)}
    assert found["loc"] == ["body", "model"]
    assert refusal(tenants.ann, model=abroad)["msg"].endswith(
        "was saved for use elsewhere; no training can start from it"
    )
    wrong_rank = tenants.ann.create(body("sft", {"lora_rank": 8}, model=path)).json()["detail"]
    assert [one["loc"] for one in wrong_rank] == [["body", "config", "lora_rank"]]
    assert "has LoRA rank 4" in wrong_rank[0]["msg"]
