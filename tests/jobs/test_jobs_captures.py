"""What the client ``dreadnode`` 2.0.52 was seen to send is answered in the shape that it was seen to accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.hosting import JobsApi

CAPTURES = [
    json.loads(line)
    for line in (Path(__file__).parent / "captures" / "dreadnode_2_0_52.jsonl").read_text().splitlines()
]
FREE = {"config", "metrics", "artifacts", "data"}
"""Objects whose keys are the job's own business."""


@pytest.fixture
def api(jobs_api: JobsApi) -> JobsApi:
    return jobs_api


def prepare(api: JobsApi, capture: dict[str, Any]) -> str:
    """The id of a job that can be asked what was asked."""
    job_id = str(api.new()["id"])
    cancelled = capture["path"].endswith("/retry") or (capture["path"].endswith("/cancel") and capture["status"] == 409)
    if cancelled:
        assert api.http.post(f"{capture['path'].rpartition('/')[0]}/cancel".format(job_id=job_id)).status_code == 200
    if capture["path"].endswith("/logs"):
        assert api.report(job_id, "step_complete", message="one").status_code == 200
    return job_id


def differences(ours: Any, seen: Any, where: str = "answer") -> list[str]:
    """Where an answer lacks what was seen, or has another type of JSON there."""
    if ours is None or seen is None:
        return []
    kinds = {int: "number", float: "number", bool: "boolean"}
    kind, wanted = (kinds.get(type(value), type(value).__name__) for value in (ours, seen))
    if kind != wanted:
        return [f"{where} is of type {kind}, not {wanted}"]
    if isinstance(seen, dict) and where.rpartition(".")[2] not in FREE:
        missing = [f"{where} has no {key}" for key in seen.keys() - ours.keys()]
        return missing + [
            found for key in seen.keys() & ours.keys() for found in differences(ours[key], seen[key], f"{where}.{key}")
        ]
    if isinstance(seen, list) and seen:
        return [found for item in ours for found in differences(item, seen[0], f"{where}[]")]
    return []


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda capture: f"{capture['method']} {capture['path'][8:]}")
def test_a_captured_request_is_answered_in_the_captured_shape(api: JobsApi, capture: dict[str, Any]) -> None:
    path = capture["path"].format(job_id=prepare(api, capture))
    answer = api.http.request(capture["method"], path, params=capture["query"], json=capture["body"])
    assert answer.status_code == capture["status"], answer.text
    if answer.status_code == 422:
        assert "unknown model: bad" in answer.json()["detail"][0]["msg"]
        return
    assert differences(answer.json(), capture["response"]) == []
    if path.endswith("/jobs") and capture["method"] == "POST":
        assert answer.json()["config"] == capture["response"]["config"]
    if path.endswith("/nope"):
        assert answer.json() == capture["response"]


def test_a_missing_key_and_another_type_are_differences() -> None:
    assert differences({"a": 1}, {"a": "1", "b": []}) == ["answer has no b", "answer.a is of type number, not str"]
    assert differences({"x": [{"a": 1}, {}]}, {"x": [{"a": 2}]}) == ["answer.x[] has no a"]
