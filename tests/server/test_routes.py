"""The API as raw HTTP: statuses, details, and mistakes that must not reach anybody else."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from tinker.proto import tinker_public_pb2

from tests.server.conftest import Api
from tinker_core.engine import Engine, EngineConfig
from tinker_core.errors import CapacityError, NonFiniteError, PluginError, StorageError, TinkerError, WorkerLostError
from tinker_core.hookspecs import hookimpl
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_server.app import create_app
from tinker_server.errors import status_of
from tinker_server.wire.body import PROTOBUF

DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [3, 4]}]},
    "loss_fn_inputs": {"target_tokens": {"data": [4, 5], "dtype": "int64", "shape": [2]}},
}


def pass_body(model_id: str, seq_id: int, *data: dict[str, Any], loss_fn: str = "cross_entropy") -> dict[str, Any]:
    wrapped = {"loss_fn": loss_fn, "data": list(data) or [DATUM]}
    return {"model_id": model_id, "seq_id": seq_id, "forward_backward_input": wrapped}


def proto_body(model_id: str, seq_id: int) -> bytes:
    message = tinker_public_pb2.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = (3).to_bytes(4, "little")
    target = datum.loss_fn_inputs["target_tokens"]
    target.dense, target.dtype = (4).to_bytes(8, "little"), tinker_public_pb2.DTYPE_INT64
    return message.SerializeToString()


# --- bootstrap --------------------------------------------------------------------------------------------------------


def test_bootstrap_answers(api: Api) -> None:
    assert api.post("telemetry", {"events": []}).json() == {"status": "accepted"}
    assert api.get("healthz").json() == {"status": "ok"}
    assert api.http.get("/healthz").json() == {"status": "ok"}
    assert api.post("session_heartbeat", {"session_id": api.session()}).json() == {"type": "session_heartbeat"}


def test_the_server_becomes_ready(api: Api) -> None:
    api.model(api.session())
    answer = api.http.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "models": {"tiny": "ready"}})


def test_a_finished_session_takes_no_new_work_but_can_be_read(api: Api) -> None:
    session_id = api.session()
    model_id = api.model(session_id)
    for reason in ("success", "errored"):
        finish = api.post(f"sessions/{session_id}/finish", {"reason": {"type": reason}, "detail": None})
        assert finish.status_code == 200
    assert api.post("session_heartbeat", {"session_id": session_id}).status_code == 410
    refused = api.post("forward_backward", pass_body(model_id, 1))
    assert refused.status_code == 400
    assert "finished" in refused.json()["detail"]
    assert api.get(f"sessions/{session_id}").json()["training_run_ids"] == [model_id]
    assert api.get(f"training_runs/{model_id}").status_code == 200


# --- statuses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "detail"),
    [
        ("POST", "get_info", {"model_id": "s:train:9"}, 404, "unknown model 's:train:9'"),
        ("POST", "get_info", {}, 400, "model_id is required"),
        ("POST", "retrieve_future", {"request_id": "r"}, 404, "unknown request 'r'"),
        ("POST", "session_heartbeat", {"session_id": "s"}, 404, "unknown session"),
        ("POST", "sessions/s/finish", {"reason": {"type": "success"}}, 404, "unknown session"),
        ("GET", "samplers/s:sample:0", None, 404, "unknown sampling session"),
        ("GET", "training_runs/s:train:0", None, 404, "unknown model"),
        ("GET", "training_runs/s:train:0/checkpoints", None, 404, "unknown model"),
        ("GET", "sessions/s", None, 404, "unknown session"),
        ("DELETE", "training_runs/s:train:0/checkpoints/weights/x", None, 404, "no checkpoint"),
        ("DELETE", "training_runs/s:train:0/checkpoints/odd/x", None, 400, "malformed tinker path"),
        ("PUT", "training_runs/s:train:0/checkpoints/weights/x/ttl", {"ttl_seconds": 3600}, 404, "no checkpoint"),
        ("PUT", "training_runs/s:train:0/checkpoints/weights/x/ttl", {}, 400, "ttl_seconds is required"),
        ("POST", "weights_info", {"tinker_path": "tinker://s:train:0/weights/x"}, 404, "no checkpoint"),
        ("POST", "weights_info", {"tinker_path": "http://x"}, 400, "malformed tinker path"),
        ("GET", "training_runs?limit=many", None, 400, "limit"),
        ("GET", "training_runs?limit=100000", None, 400, "limit must be at most"),
        ("POST", "create_session", {"tags": "x"}, 400, "tags"),
        ("POST", "retrieve_futures", {}, 400, "target is required"),
        ("POST", "cancel_future", {"request_id": "r"}, 404, "unknown request 'r'"),
        ("POST", "join_sampling_session", {"sampling_session_id": "s:sample:0"}, 404, "unknown sampling session"),
        ("POST", "save_weights_external", {}, 400, "model_id is required"),
        ("GET", "optim_step", None, 404, "is not implemented by this server yet"),
    ],
)
def test_a_wrong_call_is_answered_at_once(
    api: Api, method: str, path: str, body: object, status: int, detail: str
) -> None:
    content = None if body is None else json.dumps(body).encode()
    answer = api.http.request(method, f"/api/v1/{path}", content=content)
    assert answer.status_code == status, answer.text
    assert detail in answer.json()["detail"]
    assert int(answer.headers["content-length"]) > 0


def test_paths_outside_the_api_are_plain_404(api: Api) -> None:
    assert api.http.get("/nowhere").status_code == 404
    assert "detail" in api.http.get("/nowhere").json()


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ({"content-type": PROTOBUF}, b"\xff\xff\xff"),
        ({"content-type": PROTOBUF}, b""),
        ({"content-type": "application/json"}, b"{"),
        ({"content-type": PROTOBUF, "content-encoding": "zstd"}, b"not zstd"),
    ],
)
def test_a_body_that_is_not_what_it_claims(api: Api, headers: dict[str, str], content: bytes) -> None:
    answer = api.post("forward_backward", headers=headers, content=content)
    assert answer.status_code == 400
    assert answer.json()["detail"]


def test_a_body_beyond_the_limit(api: Api) -> None:
    assert api.post("telemetry", content=bytes(9 * 1024 * 1024)).status_code == 413
    chunks = (bytes(1024 * 1024) for _ in range(9))
    with contextlib.suppress(httpx.WriteError):
        assert api.post("telemetry", content=chunks).status_code == 413


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CapacityError("full"), 400),
        (NonFiniteError("nan"), 400),
        (StorageError("disk"), 500),
        (WorkerLostError("x"), 503),
    ],
)
def test_no_error_is_one_that_clients_retry_in_vain(error: TinkerError, status: int) -> None:
    assert status_of(error) == status


# --- futures ----------------------------------------------------------------------------------------------------------


def test_a_poll_before_the_result_is_silent(api: Api) -> None:
    """seq 2 waits for seq 1, so its poll runs into the end of the long poll."""
    model_id = api.model(api.session())
    submitted = api.post("forward_backward", pass_body(model_id, 2)).json()
    waiting = api.post("retrieve_future", {"request_id": submitted["request_id"]})
    assert waiting.status_code == 408
    assert waiting.json()["queue_state"] == "active"
    assert api.run("forward_backward", pass_body(model_id, 1))["metrics"]["loss:sum"] > 0
    assert api.retrieve(submitted["request_id"]).json()["metrics"]["loss:sum"] > 0


def test_a_result_can_be_fetched_twice_and_in_either_form(api: Api) -> None:
    model_id = api.model(api.session())
    request_id = api.post("forward_backward", pass_body(model_id, 1)).json()["request_id"]
    first = api.retrieve(request_id, "application/x-protobuf")
    assert first.headers["content-type"] == PROTOBUF
    message = tinker_public_pb2.ForwardBackwardOutput.FromString(first.content)
    assert message.loss_fn_outputs[0].num_datums == 1
    second = api.retrieve(request_id)
    assert second.headers["content-type"] == "application/json"
    assert second.json()["metrics"]["loss:sum"] == pytest.approx(message.metrics["loss:sum"])


def test_a_repeated_submission_gets_the_same_receipt(api: Api) -> None:
    model_id = api.model(api.session())
    receipts = [api.post("forward_backward", pass_body(model_id, 1)).json() for _ in range(2)]
    assert receipts[0] == receipts[1]


@pytest.mark.parametrize(
    ("encoding", "compress"), [("zstd", zstandard.ZstdCompressor().compress), ("gzip", gzip.compress), ("", bytes)]
)
def test_protobuf_bodies_may_be_compressed(api: Api, encoding: str, compress: Callable[[bytes], bytes]) -> None:
    model_id = api.model(api.session())
    headers = {"content-type": PROTOBUF, "content-encoding": encoding}
    answer = api.post("forward_backward", headers=headers, content=compress(proto_body(model_id, 1)))
    assert answer.status_code == 200
    assert api.retrieve(answer.json()["request_id"]).json()["metrics"]["loss:sum"] > 0


def test_a_large_body_is_decoded_too(api: Api) -> None:
    model_id = api.model(api.session())
    data = [DATUM] * 8000
    request = pass_body(model_id, 1, *data)
    assert len(json.dumps(request)) > 1024 * 1024
    assert len(api.run("forward_backward", request)["loss_fn_outputs"]) == 8000


# --- mistakes inside a request that has a future ----------------------------------------------------------------------


def with_targets(data: list[Any], **tensor: Any) -> dict[str, Any]:
    return {**DATUM, "loss_fn_inputs": {"target_tokens": {"data": data, "dtype": "int64", **tensor}}}


BAD_PASSES = [
    ([with_targets([4, 5], shape=[3])], "cross_entropy", "needs 3 elements"),
    ([with_targets([4, 5], dtype="float16")], "cross_entropy", "float16"),
    ([with_targets([4.5, 5])], "cross_entropy", "64-bit integers"),
    ([with_targets([4])], "cross_entropy", "data[0]"),
    ([with_targets([4, 10**6])], "cross_entropy", "data[0]"),
    ([DATUM, {**DATUM, "model_input": {"chunks": [{"tokens": [3, -1]}]}}], "cross_entropy", "data[1]"),
    (
        [{**DATUM, "model_input": {"chunks": [{"type": "image", "data": "aGk=", "format": "png"}]}}],
        "cross_entropy",
        "text",
    ),
    ([DATUM], "no_such_loss", "no_such_loss"),
]


@pytest.mark.parametrize(("data", "loss_fn", "reason"), BAD_PASSES)
def test_a_bad_pass_fails_its_own_future_only(api: Api, data: list[Any], loss_fn: str, reason: str) -> None:
    model_id = api.model(api.session())
    failed = api.run("forward_backward", pass_body(model_id, 1, *data, loss_fn=loss_fn))
    assert failed["category"] == "user"
    assert reason in failed["error"]
    assert api.run("forward_backward", pass_body(model_id, 2))["metrics"]["loss:sum"] > 0
    step = {"model_id": model_id, "seq_id": 3, "adam_params": {"learning_rate": 0.1}}
    assert "grad_norm" in api.run("optim_step", step)["metrics"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"base_model": "huge"}, "unknown base model 'huge'"),
        ({"lora_config": {"rank": -1}}, "rank"),
        ({"lora_config": {"rank": 0}}, "rank"),
        ({"lora_config": {"rank": 10**6}}, "rank"),
        ({"lora_config": {"rank": 4, "train_attn": "no"}}, "lora_config.train_attn must be true or false"),
        ({"optimizer_config": {"type": "adamw", "rate": "fast"}}, "optimizer_config has unknown fields 'rate'"),
        ({"user_metadata": {"tinker_server.alpha": 1}}, "tinker_server.lora_alpha"),
    ],
)
def test_a_bad_model_fails_in_its_future(api: Api, fields: dict[str, Any], reason: str) -> None:
    plain = {"session_id": api.session(), "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
    failed = api.run("create_model", {**plain, **fields})
    assert failed["category"] == "user"
    assert reason in failed["error"]


def test_a_bad_step_and_bad_saves_fail_in_their_futures(api: Api) -> None:
    model_id = api.model(api.session())
    step = api.run("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {"momentum": 0.9}})
    assert "momentum" in step["error"]
    save = api.run("save_weights", {"model_id": model_id, "seq_id": 2, "path": "../x"})
    assert ".." in save["error"]
    load = api.run("load_weights", {"model_id": model_id, "seq_id": 3, "path": "nowhere", "optimizer": False})
    assert "malformed tinker path" in load["error"]
    saved = api.run("save_weights", {"model_id": model_id, "seq_id": 4, "path": "x"})
    assert saved["path"] == f"tinker://{model_id}/weights/x"
    again = api.run("save_weights", {"model_id": model_id, "seq_id": 5, "path": "x"})
    assert "overwrite" in again["error"]


def test_a_checkpoint_fixes_what_metadata_says(api: Api) -> None:
    session_id = api.session()
    model_id = api.model(session_id, user_metadata={"tinker_server.lora_alpha": "8"})
    path = api.run("save_weights", {"model_id": model_id, "seq_id": 1, "path": "x"})["path"]
    load = {"session_id": session_id, "path": path, "optimizer": True}
    same = api.run("load_weights", {**load, "model_seq_id": 1, "user_metadata": {"tinker_server.lora_alpha": 8}})
    assert same["model_id"] == f"{session_id}:train:1"
    other = api.run("load_weights", {**load, "model_seq_id": 2, "user_metadata": {"tinker_server.lora_alpha": 9}})
    assert "trained with 8.0" in other["error"]
    assert other["category"] == "user"


def test_bad_samples_fail_in_their_futures_and_name_a_sequence(api: Api) -> None:
    session_id = api.session()
    opened = api.post(
        "create_sampling_session", {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
    )
    sampler = opened.json()["sampling_session_id"]
    assert api.get(f"samplers/{sampler}").json()["base_model"] == "tiny"
    request = {"sampling_session_id": sampler, "prompt": {"chunks": [{"tokens": [3]}]}}
    mistakes: list[dict[str, Any]] = [{"min_p": 1}, {"stop": {}}, {"top_k": 1.5}, {"top_p": "x"}]
    for seq_id, params in enumerate(mistakes):
        submitted = api.post("asample", {**request, "seq_id": seq_id, "sampling_params": params})
        assert len(submitted.json()["sample_sequence_ids"]) == 1
        failed = api.retrieve(submitted.json()["request_id"]).json()
        assert failed["category"] == "user"
        assert next(iter(params)) in failed["error"]
    good = {**request, "seq_id": 10**18, "num_samples": 2, "sampling_params": {"max_tokens": 2}}
    submitted = api.post("asample", good)
    assert len(submitted.json()["sample_sequence_ids"]) == 2
    assert len(api.retrieve(submitted.json()["request_id"]).json()["sequences"]) == 2


def test_a_sample_for_nobody_is_refused_at_once(api: Api) -> None:
    for params in ({}, {"min_p": 1}):
        request = {
            "sampling_session_id": "s:sample:0",
            "seq_id": 0,
            "prompt": {"chunks": []},
            "sampling_params": params,
        }
        answer = api.post("asample", request)
        assert answer.status_code == 404


def test_a_sampling_session_on_the_wrong_base_model(api: Api) -> None:
    session_id = api.session()
    model_id = api.model(session_id)
    path = api.run("save_weights_for_sampler", {"model_id": model_id, "seq_id": 1, "path": "x"})["path"]
    request = {"session_id": session_id, "sampling_session_seq_id": 0, "model_path": path, "base_model": "other"}
    answer = api.post("create_sampling_session", request)
    assert answer.status_code == 400
    assert "is of base model 'tiny'" in answer.json()["detail"]


# --- plugins ----------------------------------------------------------------------------------------------------------


class RoutePlugin:
    """Adds one route."""

    def __init__(self, path: str) -> None:
        self._path = path

    @hookimpl
    def tinker_register_routes(self, register: Callable[[Any], None]) -> None:
        async def hello(request: Request) -> PlainTextResponse:
            return PlainTextResponse("hello")

        register(Route(self._path, hello))


def with_plugin(path: str, data_dir: Path) -> TestClient:
    plugins = Plugins.load("core", FAKE_PLUGIN)
    plugins.register(RoutePlugin(path), "acme", distribution="acme-routes", version="1.2")
    return TestClient(create_app(engine_without_models(data_dir, plugins), plugins=plugins))


def engine_without_models(data_dir: Path, plugins: Plugins) -> Engine:
    return Engine(EngineConfig(base_models=(), data_dir=data_dir, backend="fake", sampler=None), plugins)


def test_plugins_add_routes_and_are_listed(tmp_path: Path) -> None:
    with with_plugin("/jobs/hello", tmp_path) as client:
        assert client.get("/jobs/hello").text == "hello"
        listed = {plugin["name"]: plugin for plugin in client.get("/plugins").json()}
    assert listed["acme"] == {
        "name": "acme",
        "distribution": "acme-routes",
        "version": "1.2",
        "hooks": ["tinker_register_routes"],
    }


@pytest.mark.parametrize("path", ["/api/v1/optim_step", "/api/v1"])
def test_plugins_stay_out_of_the_api(path: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="must lie outside /api/v1"):
        with_plugin(path, tmp_path)


def test_a_defect_is_answered_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Engine) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Engine, "supported_models", broken)
    plugins = Plugins.load("core")
    app = create_app(engine_without_models(tmp_path, plugins), plugins=plugins)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/api/v1/get_server_capabilities")
    assert answer.status_code == 500
    assert "ZeroDivisionError" in answer.json()["detail"]
