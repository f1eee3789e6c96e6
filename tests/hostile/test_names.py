"""Names, paths and ids that try to leave the data directory, to reach other things, or to be two things at once."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest

from tests.hostile.asgi import Call
from tests.hostile.conftest import SECRET, Target
from tinker_core.errors import InvalidRequestError, TinkerError, UserError
from tinker_core.storage.checkpoints import location_of, new_version, safe_directory_name
from tinker_core.types import CheckpointType, TinkerPath, check_checkpoint_name

NAMES = [
    "..",
    ".",
    "...",
    "../x",
    "a/../../x",
    "/etc/passwd",
    "//x",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\n",
    "a b",
    "%2e%2e",
    "..%2fx",
    ".hidden",
    "-rf",
    "~",
    "$HOME",
    "caf\u00e9",
    "cafe\u0301",
    "\uff0e\uff0e\uff0fx",
    "\u2024\u2024/x",
    "\u202ex",
    "\ufeffx",
    "a" * 256,
    "a" * 100_000,
    "",
]
"""What is no checkpoint name. ASCII alone is allowed, so that no two names can look alike or be normalised to one."""


def short(text: str) -> str:
    return ascii(text[:20])


@pytest.mark.parametrize("name", NAMES, ids=short)
def test_a_name_that_is_not_one_plain_segment(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        check_checkpoint_name(name)
    with pytest.raises(UserError):
        TinkerPath.parse(f"tinker://s:train:0/weights/{name}")
    path = TinkerPath(run_id="s:train:0", kind=CheckpointType.TRAINING, name=name)  # not made by parse
    for version in (None, new_version()):
        with pytest.raises(TinkerError):
            location_of(path, version)


@pytest.mark.parametrize("run_id", [*NAMES, "con", "x" * 300], ids=short)
def test_any_model_id_makes_one_safe_directory(run_id: str) -> None:
    name = safe_directory_name(run_id)
    assert name == Path(name).name
    assert name not in ("", ".", "..")
    assert name.isascii()
    assert len(name) <= 255
    assert not set(name) & set("/\\\0\n ")


def test_ids_that_differ_have_directories_that_differ() -> None:
    ids = [*NAMES, "a/b", "a%2Fb", "a%2fb", "A/B", "caf\u00e9", "cafe\u0301", "x" * 300, "x" * 301, "x" * 100 + "%-y"]
    assert len({safe_directory_name(run_id) for run_id in ids}) == len(set(ids))


SUBMISSIONS = {
    "save_weights": "path",
    "save_weights_for_sampler": "path",
    "save_weights_external": "path",
    "load_weights": "path",
}


@pytest.mark.parametrize("endpoint", SUBMISSIONS)
def test_no_save_and_no_load_leaves_the_data_directory(target: Target, endpoint: str) -> None:
    loading = endpoint == "load_weights"
    new = {"session_id": target.ids["SESSION"], "model_seq_id": 100 + list(SUBMISSIONS).index(endpoint)}
    model = target.hosted.result("create_model", {**new, "base_model": "tiny", "lora_config": {"rank": 2}})["model_id"]
    for number, name in enumerate(NAMES, start=1):
        path = f"tinker://{target.ids['MODEL']}/weights/{name}" if loading else name
        body = {"model_id": model, "seq_id": number, "path": path, **({"optimizer": False} if loading else {})}
        result = target.hosted.result(endpoint, body)
        assert result["category"] == "user", (name, result)
    assert target.files_outside() == {"data", "canary.txt"}


def test_no_path_parameter_leaves_the_data_directory(target: Target) -> None:
    """The canary lies beside the data directory; nobody may read, list or remove it by any road."""
    up = ["../" * depth + "canary.txt" for depth in range(1, 7)] + [str(target.root / "canary.txt")]
    shown = [form for text in up for form in (text, quote(text, safe=""), quote(quote(text, safe=""), safe=""))]
    run = target.ids["MODEL"]
    for text in [*shown, *(quote(name[:1000], safe="") for name in NAMES)]:
        for path in (
            f"training_runs/{run}/checkpoints/weights/{text}",
            f"training_runs/{run}/checkpoints/{text}",
            f"training_runs/{run}/checkpoints/{text}/archive",
            f"training_runs/{run}/checkpoints/weights/{text}/archive",
            f"training_runs/{run}/checkpoints/weights/{text}/external_weights_urls",
            f"training_runs/{text}",
            f"training_runs/{text}/checkpoints",
            f"sessions/{text}",
            f"sessions/{text}/trace_export",
            f"samplers/{text}",
        ):
            for method in ("GET", "DELETE"):
                answer = target.hosted.send(Call(method=method, target=f"/api/v1/{path}"))
                assert answer.status in (400, 404, 405), (method, path, answer.body)
        for path in (f"files/{run}/weights/w0/{text}", f"archives/{run}/weights/{text}", f"traces/{text}", text):
            answer = target.hosted.send(Call(method="GET", target=f"/download/{path}?expires=1&signature=x"))
            assert answer.status in (400, 401, 403, 404), (path, answer.body)
    assert (target.root / "canary.txt").read_text() == SECRET


@pytest.mark.parametrize("key", ["weights_info", "create_sampling_session", "copy_weights"])
def test_no_tinker_path_in_a_body_leaves_the_data_directory(target: Target, key: str) -> None:
    session = target.ids["SESSION"]
    for number, name in enumerate(NAMES):
        for path in (f"tinker://{target.ids['MODEL']}/weights/{name}", f"tinker://{name}/weights/w0", name):
            body = {
                "weights_info": {"tinker_path": path},
                "create_sampling_session": {
                    "session_id": session,
                    "sampling_session_seq_id": 1000 + number,
                    "model_path": path,
                },
                "copy_weights": {"source_path": path, "destination_project_id": "p"},
            }[key]
            assert target.hosted.post(key, body).status in (400, 404), path


def test_names_come_back_as_they_were_and_never_as_headers(target: Target) -> None:
    """What users write into names and metadata is shown as JSON, and nowhere else."""
    text = "x\r\nSet-Cookie: a=b\r\n\r\n<script>\u2028"
    body = {"display_name": text, "project_id": text, "tags": [text], "user_metadata": {text: text}}
    session = target.hosted.post("create_session", body).json()["session_id"]
    shown = target.hosted.get(f"sessions/{session}")
    assert shown.json()["user_metadata"] == {text: text}
    assert shown.header("content-type").startswith("application/json")
    assert shown.header("set-cookie") == ""


@pytest.mark.parametrize(
    "host", ["[::1", "evil.test/path", "a b", "evil.test\\@x", "x" * 5000, "", "\xff", "a:99999999"]
)
def test_a_strange_host_header_is_no_part_of_any_answer(target: Target, host: str) -> None:
    ids = target.ids
    for path in (
        f"/api/v1/training_runs/{ids['MODEL']}/checkpoints/weights/w0/archive",
        f"/api/v1/sessions/{ids['SESSION']}/trace_export",
        "/api/v1/nowhere",
        "/nowhere",
        "/healthz/",
        "/api/v1/sessions/",
    ):
        headers = ((b"host", host.encode("latin-1")), (b"accept", b"gzip"))
        call = Call(method="GET", target=path, headers=headers, host=False)
        answer = target.hosted.send(call)
        assert answer.status in (400, 404), (path, answer)
        assert answer.header("location") == ""


def test_forwarding_headers_are_not_believed(target: Target) -> None:
    headers = ((b"x-forwarded-host", b"evil.test"), (b"x-forwarded-proto", b"https"), (b"forwarded", b"host=evil.test"))
    path = f"/api/v1/training_runs/{target.ids['MODEL']}/checkpoints/weights/w0/archive"
    answer = target.hosted.send(Call(method="GET", target=path, headers=headers))
    assert answer.status == 200
    assert answer.json()["url"].startswith("http://tinker.test/download/")
