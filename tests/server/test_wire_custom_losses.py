"""create_custom_loss as clients send it, and settings that say nothing or too much, in both forms of a pass."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tinker.proto import tinker_public_pb2

from tinker_core.custom_losses.check import check_custom_loss
from tinker_core.errors import InvalidLossConfigError, InvalidRequestError
from tinker_core.interfaces import LossPlugin
from tinker_core.training.validation import PassLimits, check_pass
from tinker_core.types import CreateCustomLossInput, CreateModelInput, ForwardBackwardInput, OptimStepInput
from tinker_core.types import PreparedModelPass as Pass
from tinker_server.wire.body import PROTOBUF, Body
from tinker_server.wire.custom_losses import read_create_custom_loss
from tinker_server.wire.models import read_create_model
from tinker_server.wire.rejected import RejectedRequest
from tinker_server.wire.training import read_forward_backward, read_optim_step

GRAPH: dict[str, Any] = {
    "format": 1,
    "nodes": [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}},
        {"op": "placeholder", "name": "weights", "target": "weights", "args": [], "kwargs": {}},
        {
            "op": "call_function",
            "name": "mul",
            "target": "operator.mul",
            "args": [{"ref": "logprobs"}, {"ref": "weights"}],
            "kwargs": {},
        },
        {"op": "call_method", "name": "sum_1", "target": "sum", "args": [{"ref": "mul"}], "kwargs": {}},
        {
            "op": "output",
            "name": "output",
            "target": "output",
            "args": [{"tuple": [{"ref": "sum_1"}, {"dict": {"custom/neg_ll:sum": {"ref": "sum_1"}}}]}],
            "kwargs": {},
        },
    ],
}
LOSS: dict[str, Any] = {
    "session_id": "s",
    "custom_loss_seq_id": 0,
    "name": "neg_ll",
    "inputs": [{"name": "logprobs", "rank": 1}, {"name": "weights", "rank": 1}],
    "graph": GRAPH,
    "type": "create_custom_loss",
}


def body(value: object) -> Body:
    return Body(data=json.dumps(value).encode())


def reason(decoded: object) -> str:
    assert isinstance(decoded, RejectedRequest)
    assert decoded.error.category == "user"
    return decoded.error.message


def test_a_graph_as_the_sdk_sends_it() -> None:
    decoded = read_create_custom_loss(body(LOSS))
    assert isinstance(decoded, CreateCustomLossInput)
    assert (decoded.session_id, decoded.custom_loss_seq_id, decoded.loss.name) == ("s", 0, "neg_ll")
    assert [node.target for node in decoded.loss.nodes] == ["logprobs", "weights", "operator.mul", "sum", "output"]
    check_custom_loss(decoded.loss)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"graph": None}, "graph"),
        ({"graph": {**GRAPH, "format": 2}}, "format"),
        ({"graph": {"nodes": [{"op": "import", "name": "x", "target": "os"}]}}, r"nodes[0].op"),
        ({"graph": {"nodes": ["x"]}}, r"nodes[0]"),
        ({"graph": {"nodes": [{"op": "output", "name": "x", "target": "y", "code": "1"}]}}, "code"),
        ({"graph": {**GRAPH, "globals": {"a": 1}}}, "globals"),
        ({"inputs": [{"name": "logprobs", "rank": "1"}]}, "rank"),
        ({"inputs": [{"name": "logprobs", "rank": 1, "default": 3}]}, "default"),
        ({"name": None}, "name"),
    ],
)
def test_a_graph_in_another_form_fails_in_its_future(change: dict[str, Any], named: str) -> None:
    assert named in reason(read_create_custom_loss(body({**LOSS, **change})))


def test_a_loss_without_a_place_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequestError, match="session_id"):
        read_create_custom_loss(body({**LOSS, "session_id": None}))
    with pytest.raises(InvalidRequestError, match="custom_loss_seq_id"):
        read_create_custom_loss(body({**LOSS, "custom_loss_seq_id": -1}))


# --- settings that say nothing, and settings that nobody knows --------------------------------------------------------

TENSOR = {"data": [1], "dtype": "int64", "shape": [1]}
DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
    "loss_fn_inputs": {"target_tokens": TENSOR},
}
KNOWING = LossPlugin(name="knowing", compute=lambda logprobs, context: logprobs.sum(), default_config={"beta": 0.5})


def json_pass(config: dict[str, Any]) -> object:
    wrapped = {"data": [DATUM], "loss_fn": "knowing", "loss_fn_config": config}
    return read_forward_backward(body({"model_id": "m", "seq_id": 1, "forward_backward_input": wrapped}))


def proto_pass(config: dict[str, Any]) -> object:
    message = tinker_public_pb2.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="knowing")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = (1).to_bytes(4, "little")
    datum.loss_fn_inputs["target_tokens"].dense = (1).to_bytes(8, "little")
    datum.loss_fn_inputs["target_tokens"].dtype = tinker_public_pb2.DTYPE_INT64
    for key, value in config.items():
        entry = message.loss_fn_config_v2[key]
        if isinstance(value, str):
            entry.text = value
        elif value is not None:
            entry.number = value
    return read_forward_backward(Body(data=message.SerializeToString(), content_type=PROTOBUF))


def check(decoded: object) -> None:
    assert isinstance(decoded, ForwardBackwardInput)
    request = Pass(
        request_id="r",
        model_id="m",
        data=decoded.data,
        loss_fn=decoded.loss_fn,
        loss_fn_config=decoded.loss_fn_config,
    )
    check_pass(request, {"knowing": KNOWING}, PassLimits(vocab_size=9, max_context_length=9))


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_setting_that_says_nothing_is_ignored(value: object) -> None:
    check(json_pass({"gamma": value, "beta": 0.1}))
    if value is None or isinstance(value, float | str):
        check(proto_pass({"gamma": value, "beta": 0.1}))


@pytest.mark.parametrize("value", [1, 0.5, "x"])
def test_an_unknown_setting_that_says_something_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidLossConfigError, match="gamma"):
        check(json_pass({"gamma": value}))
    with pytest.raises(InvalidLossConfigError, match="gamma"):
        check(proto_pass({"gamma": value}))


@pytest.mark.parametrize("value", [True, [1], {"a": 1}])
def test_a_setting_of_an_impossible_kind_fails_in_its_future(value: object) -> None:
    assert "gamma" in reason(json_pass({"gamma": value}))


def test_false_is_no_number_for_a_setting_that_is_known() -> None:
    with pytest.raises(InvalidLossConfigError, match="beta"):
        check(json_pass({"beta": False}))


def optim(**fields: Any) -> OptimStepInput | RejectedRequest:
    return read_optim_step(body({"model_id": "m", "seq_id": 1, **fields}))


def create(**fields: Any) -> CreateModelInput | RejectedRequest:
    plain = {"session_id": "s", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
    return read_create_model(body({**plain, **fields}))


@pytest.mark.parametrize("value", [None, False, 0, "", []])
def test_unknown_fields_that_say_nothing_are_ignored_everywhere(value: object) -> None:
    assert isinstance(optim(adam_params={"learning_rate": 0.1, "amsgrad": value}), OptimStepInput)
    assert isinstance(optim(optimizer_params={"type": "sgd", "nesterov": value}), OptimStepInput)
    assert isinstance(create(lora_config={"rank": 4, "dropout": value}), CreateModelInput)
    assert isinstance(create(optimizer_config={"type": "adamw", "amsgrad": value}), CreateModelInput)


@pytest.mark.parametrize("value", [True, 0.5, "yes", [1]])
def test_unknown_fields_that_say_something_are_refused_by_name(value: object) -> None:
    assert "amsgrad" in reason(optim(adam_params={"amsgrad": value}))
    assert "dropout" in reason(create(lora_config={"rank": 4, "dropout": value}))


def test_settings_of_a_plugins_family_travel_as_they_are() -> None:
    stepped = optim(optimizer_params={"type": "sgd", "learning_rate": 0.1, "nesterov": True, "mode": "fast"})
    assert isinstance(stepped, OptimStepInput)
    assert stepped.optimizer_params == {"type": "sgd", "learning_rate": 0.1, "nesterov": True, "mode": "fast"}
    created = create(optimizer_config={"type": "dimuon", "version": 1, "mode": "fast", "none": None})
    assert isinstance(created, CreateModelInput)
    assert created.optimizer_config.settings == {"version": 1, "mode": "fast"}
    for bad in ([1, 2], {"a": 1}):
        assert "betas" in reason(create(optimizer_config={"type": "x", "betas": bad}))
        assert "betas" in reason(optim(optimizer_params={"type": "x", "betas": bad}))
    assert "type" in reason(optim(optimizer_params={"learning_rate": 0.1}))
