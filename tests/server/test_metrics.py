"""What the server counts, and fields that it does not know."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from tinker.proto import tinker_public_pb2

from tests.held_sampler import HOLD, HeldSampler, prompt_json
from tests.server.conftest import Api, open_api
from tests.server.test_routes import pass_body, proto_body
from tinker_server.client_flags import ClientFlags
from tinker_server.wire import unknown
from tinker_server.wire.body import PROTOBUF


def value(api: Api, name: str, **labels: str) -> float:
    """A metric's value, summed over the labels that are left out."""
    total = 0.0
    for line in api.http.get("/metrics").text.splitlines():
        found = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
        if found and all(f'{key}="{wanted}"' in (found[1] or "") for key, wanted in labels.items()):
            total += float(found[2])
    return total


@pytest.fixture
def fresh_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown fields as in a process that has seen none."""
    monkeypatch.setattr(unknown, "_known_names", set())


def sampler_of(api: Api, session_id: str) -> str:
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
    return str(api.post("create_sampling_session", body).json()["sampling_session_id"])


def asample(api: Api, sampler: str, seq_id: int, **fields: Any) -> Any:
    body = {"sampling_session_id": sampler, "seq_id": seq_id, "prompt": prompt_json(3), "sampling_params": {}}
    return api.post("asample", {**body, **fields})


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_work_is_counted_by_base_model_type_and_outcome(api: Api) -> None:
    session_id = api.session()
    model_id = api.model(session_id)
    api.run("forward_backward", pass_body(model_id, 1))  # one datum of two tokens
    api.run("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {}})
    assert api.run("forward_backward", pass_body(model_id, 3, loss_fn="none"))["error"]
    sampled = asample(api, sampler_of(api, session_id), 0, sampling_params={"max_tokens": 4, "stop": []}, num_samples=2)
    api.retrieve(sampled.json()["request_id"])
    base = {"base_model": "tiny"}
    assert value(api, "tinker_requests_finished_total", outcome="completed", **base) == 4
    assert value(api, "tinker_requests_finished_total", outcome="failed", **base) == 1
    assert [value(api, "tinker_tokens_total", kind=kind, **base) for kind in ("trained", "prefilled", "sampled")] == [
        2,
        3,
        8,
    ]
    assert value(api, "tinker_models_resident", **base) == 1
    assert value(api, "tinker_requests_queued", **base) == value(api, "tinker_requests_running", **base) == 0
    assert value(api, "tinker_request_seconds_count", request_type="sample", outcome="completed") == 1
    assert value(api, "tinker_request_seconds_count", request_type="forward_backward", outcome="failed") == 1


def test_work_journal_and_models_are_measured(api: Api) -> None:
    before = {name: value(api, name) for name in ("tinker_journal_commits_total", "tinker_journal_requests")}
    steps = value(api, "tinker_work_seconds_count", kind="step")
    fills = value(api, "tinker_pass_fill_count", base_model="tiny")
    model_id = api.model(api.session())
    api.run("forward_backward", pass_body(model_id, 1))
    api.run("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {}})
    assert value(api, "tinker_work_seconds_count", base_model="tiny", kind="step") == steps + 1
    assert value(api, "tinker_pass_fill_count", base_model="tiny") == fills + 1
    assert value(api, "tinker_pass_fill_sum", base_model="tiny") > 0
    assert value(api, "tinker_journal_commits_total") > before["tinker_journal_commits_total"]
    assert value(api, "tinker_journal_requests") == before["tinker_journal_requests"]
    assert value(api, "tinker_journal_full") == 0
    assert value(api, "tinker_journal_max_bytes") > value(api, "tinker_journal_bytes") > 0
    assert value(api, "tinker_snapshot_lag_requests") > 0
    stuck = api.post("forward_backward", pass_body(model_id, 9)).json()["request_id"]  # 3 to 8 are missing
    assert value(api, "tinker_requests_queued", base_model="tiny") == 1
    assert value(api, "tinker_oldest_queued_seconds", base_model="tiny") == 0  # it is not the device that it waits for
    api.run("optim_step", {"model_id": model_id, "seq_id": 10, "adam_params": {}})
    api.retrieve(stuck)
    assert value(api, "tinker_worker_losses_total", base_model="tiny") == 0


def test_http_requests_are_counted_by_template_and_never_by_what_clients_write(api: Api) -> None:
    secret = "s-" + "x" * 30
    api.get(f"training_runs/{secret}")
    api.http.get(f"/{secret}")
    api.http.request("PROPFIND", f"/api/v1/{secret}")
    assert value(api, "tinker_http_requests_total", route="/api/v1/training_runs/{run_id}", status="404") == 1
    assert value(api, "tinker_http_requests_total", route="other", status="404") == 1
    assert value(api, "tinker_http_requests_total", method="other") == 1
    text = api.http.get("/metrics").text
    assert secret not in text
    assert "local" not in text
    assert api.http.get("/metrics").headers["content-type"].startswith("text/plain; version=")


def test_polls_and_samples_in_progress_are_shown(tmp_path: Path) -> None:
    held = HeldSampler(slots=1)
    with open_api(tmp_path / "data", sampler=held) as api:
        request_id = asample(api, sampler_of(api, api.session()), 0, prompt=prompt_json(HOLD)).json()["request_id"]
        held.wait_started()
        assert value(api, "tinker_samples_in_progress", base_model="tiny") == 1
        assert value(api, "tinker_open_polls") == 0
        held.release()
        api.retrieve(request_id)
        assert value(api, "tinker_samples_in_progress", base_model="tiny") == 0


# --- unknown fields ---------------------------------------------------------------------------------------------------

TRIVIAL = {"new_a": None, "new_b": False, "new_c": 0, "new_d": "", "new_e": [], "new_f": {}, "new_g": 0.0}


@pytest.mark.usefixtures("fresh_names")
def test_a_trivial_unknown_field_is_ignored_everywhere(api: Api) -> None:
    session_id = str(api.post("create_session", {"tags": [], **TRIVIAL}).json()["session_id"])
    model_id = api.model(session_id, lora_config={"rank": 4, **TRIVIAL}, **TRIVIAL)
    stepped = {"model_id": model_id, "seq_id": 1, "adam_params": {"learning_rate": 1e-3, **TRIVIAL}, **TRIVIAL}
    assert "metrics" in api.run("optim_step", stepped)
    answer = asample(api, sampler_of(api, session_id), 0, sampling_params={"max_tokens": 1, **TRIVIAL}, **TRIVIAL)
    assert "sequences" in api.retrieve(answer.json()["request_id"]).json()
    assert value(api, "tinker_unknown_fields_total", field="new_a") == 0


@pytest.mark.usefixtures("fresh_names")
def test_an_unknown_field_fails_its_future_where_it_could_change_the_result(api: Api) -> None:
    session_id = api.session()
    model_id = api.model(session_id)
    failures = [
        api.run("create_model", create_body(session_id, lora_config={"rank": 4, "alpha": 3})),
        api.run("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {"rho": 1}}),
        api.run("forward_backward", {**pass_body(model_id, 2), "forward_backward_input": config_body({"tau": 2.0})}),
    ]
    answer = asample(api, sampler_of(api, session_id), 0, sampling_params={"min_p": 0.1, "max_tokens": 1})
    failures.append(api.retrieve(answer.json()["request_id"]).json())
    for failure, name in zip(failures, ("alpha", "rho", "tau", "min_p"), strict=True):
        assert failure["category"] == "user"
        assert name in failure["error"]


def create_body(session_id: str, **fields: Any) -> dict[str, Any]:
    return {"session_id": session_id, "model_seq_id": 5, "base_model": "tiny", **fields}


def config_body(config: dict[str, Any]) -> dict[str, Any]:
    wrapped: dict[str, Any] = pass_body("", 0)["forward_backward_input"]
    return {**wrapped, "loss_fn_config": config}


@pytest.mark.usefixtures("fresh_names")
def test_any_other_unknown_field_is_logged_once_and_counted(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    session_id = api.session()
    sampler = sampler_of(api, session_id)
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [3], "shade": 1}, {"tokens": [4], "shade": 2}]}
    with caplog.at_level(logging.WARNING, logger="tinker_server.wire.unknown"):
        for seq_id in range(3):
            asample(api, sampler, seq_id, novelty={"a": 1}, prompt=prompt)
    assert [record.args for record in caplog.records] == [("chunks[].shade",), ("novelty",)]
    assert value(api, "tinker_unknown_fields_total", field="novelty") == 3
    assert value(api, "tinker_unknown_fields_total", field="chunks[].shade") == 6


@pytest.mark.usefixtures("fresh_names")
def test_unknown_protobuf_fields_are_counted_by_number(api: Api) -> None:
    model_id = api.model(api.session())
    message = tinker_public_pb2.ForwardBackwardRequest.FromString(proto_body(model_id, 1))
    datum = bytes([0x7A, 2]) + b"hi"  # field 15
    inner = message.data[0].SerializeToString() + datum
    rest = tinker_public_pb2.ForwardBackwardRequest(model_id=model_id, seq_id=1, loss_fn="cross_entropy")
    body = rest.SerializeToString() + bytes([0x1A, len(inner)]) + inner + bytes([0xF8, 0x06, 1])  # field 111
    answer = api.post("forward_backward", content=body, headers={"content-type": PROTOBUF})
    assert "error" not in api.retrieve(answer.json()["request_id"]).json()
    assert value(api, "tinker_unknown_fields_total", field="Datum.15") == 1
    assert value(api, "tinker_unknown_fields_total", field="ForwardBackwardRequest.111") == 1


@pytest.mark.usefixtures("fresh_names")
def test_names_that_clients_make_up_fill_neither_log_nor_metrics(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    hostile = {"a\nWARNING forged": 1, 'quo"te{}': 1, "x" * 5000: 1, "ünïcode": 1}
    with caplog.at_level(logging.WARNING, logger="tinker_server.wire.unknown"):
        for _ in range(2):
            api.post("session_heartbeat", {"session_id": "s", **hostile})
        made_up = {f"made_up_{number}": 1 for number in range(3 * unknown.MAX_NAMES)}
        api.post("session_heartbeat", {"session_id": "s", **made_up})
    assert len(caplog.records) <= unknown.MAX_NAMES + 1
    assert not any("\n" in record.getMessage() for record in caplog.records)
    names = re.findall(r'tinker_unknown_fields_total{field="(\w+)"', api.http.get("/metrics").text)
    assert len(names) <= unknown.MAX_NAMES + 20  # and those of other tests
    assert value(api, "tinker_unknown_fields_total", field="other") >= unknown.MAX_NAMES


# --- what clients are told --------------------------------------------------------------------------------------------


def test_clients_are_told_what_suits_this_server(api: Api) -> None:
    told = api.post("client/config", {"sdk_version": "0.38.0"}).json()
    assert told["sample_join_sampling_session"] is True
    assert "sample_use_retrieve_futures" not in told
    assert api.post("client/config", {}).json() == told
    dynamic = api.post("client/dynamic_config", {"sdk_version": "0.38.0"}).json()
    assert dynamic["sample_cancel_enabled"] is True


@pytest.mark.parametrize("version", ["0.22.0", "0.22.1"])
def test_the_version_counts_only_where_a_release_is_broken(api: Api, version: str) -> None:
    told = api.post("client/config", {"sdk_version": version}).json()
    others = [api.post("client/config", {"sdk_version": other}).json() for other in ("0.21.0", "0.22.2", "9.9")]
    assert others == [{key: told[key] for key in told if key != "use_pyqwest_transport"}] * 3
    assert told["use_pyqwest_transport"] is False


def test_each_setting_reaches_the_clients() -> None:
    flags = ClientFlags(
        retrieve_futures=True,
        compress_uploads=True,
        patient_samples=True,
        client_side_losses=True,
        max_samples_in_flight=7,
    )
    assert flags.config("0.38.0", issues_tokens=True) == {
        "sample_join_sampling_session": True,
        "sample_max_concurrent_requests": 7,
        "custom_loss_server_side": False,
        "pjwt_auth_enabled": True,
        "sample_use_retrieve_futures": True,
        "proto_compress_fwdbwd": True,
        "sample_enable_stuck_detection": False,
    }
