"""What clients of training jobs find around them: the organization, its workspace, and what can be trained."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.jobs.hosting import SCOPE, JobsApi, body, ref, serve_jobs
from tinker_core.errors import ConfigurationError
from tinker_jobs.service.catalog import read_architecture


@pytest.fixture
def api(jobs_api: JobsApi) -> JobsApi:
    return jobs_api


def test_clients_find_the_organization_its_workspace_and_projects(api: JobsApi) -> None:
    organization = api.http.get("/api/v1/org/local").json()
    workspace = api.http.get(SCOPE).json()
    assert (organization["key"], workspace["key"], workspace["org_id"]) == ("local", "default", organization["id"])
    assert api.http.get("/api/v1/org/local/ws").json() == [workspace]
    assert workspace["is_default"] is True
    assert [project["key"] for project in api.http.get(f"{SCOPE}/projects").json()] == ["default"]
    project = api.http.get(f"{SCOPE}/projects/apollo").json()
    assert (project["key"], project["workspace_id"], project["is_default"]) == ("apollo", workspace["id"], False)
    ids = [organization["id"], workspace["id"], project["id"], api.http.get("/api/v1/user").json()["id"]]
    assert len({str(uuid.UUID(found)) for found in ids}) == 4


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("org/other", "Organization not found"),
        ("org/other/ws", "Organization not found"),
        ("org/other/ws/default/training/jobs", "Organization not found"),
        ("org/local/ws/other", "Workspace not found"),
        ("org/local/ws/other/training/jobs", "Workspace not found"),
        ("org/local/ws/default/projects/A_B", "Project not found"),
    ],
)
def test_other_places_do_not_exist(api: JobsApi, path: str, detail: str) -> None:
    answer = api.http.get(f"/api/v1/{path}")
    assert (answer.status_code, answer.json()) == (404, {"detail": detail})


def test_the_settings_name_the_organization_and_the_workspace(tmp_path: Path) -> None:
    with serve_jobs(tmp_path, options={"jobs-organization": "acme", "jobs-workspace": "lab"}) as api:
        assert api.http.get("/api/v1/org/acme/ws/lab").json()["key"] == "lab"
        assert api.http.get("/api/v1/org/local").status_code == 404
        request = body(capability_ref=ref("acme/helper"))
        assert api.http.post("/api/v1/org/acme/ws/lab/training/jobs", json=request).status_code == 201


def test_names_that_clients_refuse_are_refused_by_the_settings(tmp_path: Path) -> None:
    for options in ({"jobs-organization": "My Org"}, {"jobs-workspace": ""}):
        with pytest.raises(ConfigurationError, match="lowercase"), serve_jobs(tmp_path, options=options):
            pass


def test_the_catalog_tells_what_can_be_trained_and_how(api: JobsApi) -> None:
    def browse(**query: Any) -> list[str]:
        answer = api.http.get("/api/v1/training/catalog", params=query)
        assert answer.status_code == 200, answer.text
        assert answer.json()["limit"] == query.get("limit", 20)
        return [model["tinker_id"] for model in answer.json()["models"]]

    every = ["local/tiny", "local/m", "local/smollm2-135m-instruct", "silent"]
    assert browse() == every
    described = api.http.get("/api/v1/training/catalog").json()["models"][0]
    assert described.pop("context_length") > 0
    assert described == {
        "tinker_id": "local/tiny",
        "display_name": "tiny",
        "family": "llama",
        "type": "dense",
        "size_b": 0.002,
        "extended_context": False,
        "supported_algorithms": ["sft", "importance_sampling", "ppo"],
        "pricing": None,
    }
    assert browse(query="SMOL") == ["local/smollm2-135m-instruct"]
    assert browse(family="llama") == browse(min_size_b=0.001) == ["local/tiny"]
    assert browse(max_size_b=0.001) == every[1:]
    assert browse(algorithm="ppo") == every[:3]
    assert browse(algorithm="sft", limit=1) == ["local/tiny"]
    limited = api.http.get("/api/v1/training/catalog", params={"limit": 1}).json()
    assert (len(limited["models"]), limited["total"]) == (1, 4)


def test_the_catalog_sees_a_model_whose_files_come_while_the_server_runs(tmp_path: Path) -> None:
    def described() -> tuple[str, float]:
        found = read_architecture(str(tmp_path))
        return found.family, found.size_b

    assert described() == ("unknown", 0)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"half")
    assert described() == ("unknown", 0)
    save_file({"w": np.zeros((1000, 2000), dtype=np.float32)}, tmp_path / "model.safetensors")
    assert described() == ("llama", 0.002)


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": 101}, {"algorithm": "grpo"}, {"min_size_b": "nan"}, {"size": 1}], ids=str
)
def test_the_catalog_refuses_what_it_does_not_know(api: JobsApi, query: dict[str, Any]) -> None:
    refused = api.http.get("/api/v1/training/catalog", params=query)
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["query", *query]
