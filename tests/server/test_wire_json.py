"""JSON in the shapes of older clients, hand-written requests, and their mistakes."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import numpy as np
import pytest

from tests.server.test_wire_captures import floats, full_sample, integers
from tinker_core.errors import InvalidRequestError
from tinker_core.types import (
    CreateModelInput,
    CreateModelOutput,
    EncodedTextChunk,
    ForwardBackwardInput,
    ForwardBackwardOutput,
    ImageChunk,
    LoadWeightsInput,
    LoadWeightsOutput,
    OptimStepInput,
    OptimStepOutput,
    RequestError,
    RequestType,
    SampleInput,
    SaveWeightsForSamplerInput,
    SaveWeightsOutput,
    StopCondition,
)
from tinker_server.wire.body import Body, UndecodableBodyError
from tinker_server.wire.models import read_create_model
from tinker_server.wire.rejected import RejectedRequest
from tinker_server.wire.results import encode
from tinker_server.wire.sampling import read_asample, read_create_sampling_session
from tinker_server.wire.sessions import read_create_session, read_ttl
from tinker_server.wire.training import read_forward_backward, read_optim_step
from tinker_server.wire.weights import read_load_weights, read_save_weights, read_save_weights_for_sampler

JSON = "application/json"


def body(value: object) -> Body:
    return Body(data=json.dumps(value).encode())


def rejection(decoded: object) -> str:
    assert isinstance(decoded, RejectedRequest)
    assert decoded.error.category == "user"
    return decoded.error.message


# --- passes -----------------------------------------------------------------------------------------------------------

TENSOR = {"data": [11, 12, 13], "dtype": "int64", "shape": [3]}


def pass_body(**datum: Any) -> dict[str, Any]:
    plain = {"model_input": {"chunks": [{"tokens": [10, 11, 12]}]}, "loss_fn_inputs": {"target_tokens": TENSOR}}
    wrapped = {"loss_fn": "cross_entropy", "loss_fn_config": None, "data": [{**plain, **datum}]}
    return {"model_id": "s:train:0", "seq_id": 1, "forward_backward_input": wrapped}


def test_a_pass_without_types() -> None:
    decoded = read_forward_backward(body(pass_body()))
    assert isinstance(decoded, ForwardBackwardInput)
    assert decoded.data[0].model_input.text_tokens().tolist() == [10, 11, 12]
    assert decoded.data[0].loss_fn_inputs["target_tokens"].to_numpy().tolist() == [11, 12, 13]
    assert decoded.loss_fn_config == {}


def test_the_forward_path_and_its_key() -> None:
    request = pass_body()
    request["forward_input"] = request.pop("forward_backward_input")
    decoded = read_forward_backward(body(request), forward_only=True)
    assert isinstance(decoded, ForwardBackwardInput)
    assert decoded.forward_only


def test_sparse_tensors() -> None:
    sparse = {"data": [5, 6], "dtype": "int64", "shape": [2, 3], "sparse_crow_indices": [0, 1, 2]}
    tensor = {**sparse, "sparse_col_indices": [0, 2]}
    decoded = read_forward_backward(body(pass_body(loss_fn_inputs={"target_tokens": tensor})))
    assert isinstance(decoded, ForwardBackwardInput)
    assert decoded.data[0].loss_fn_inputs["target_tokens"].to_numpy().tolist() == [[5, 0, 0], [0, 0, 6]]


def test_nan_reaches_the_engine_which_knows_what_it_means() -> None:
    weights = {"data": [1.0, math.nan, math.inf], "dtype": "float32"}
    decoded = read_forward_backward(body(pass_body(loss_fn_inputs={"weights": weights})))
    assert isinstance(decoded, ForwardBackwardInput)
    values = decoded.data[0].loss_fn_inputs["weights"].to_numpy()
    assert np.isnan(values[1])
    assert np.isinf(values[2])


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ({"data": [1, 2], "dtype": "int64", "shape": [3]}, "needs 3 elements, got 2"),
        ({"data": [1, 2], "dtype": "int32"}, "'int32' is not one of float32, int64"),
        ({"data": [1.5], "dtype": "int64"}, "data must be a flat list of 64-bit integers"),
        ({"data": ["a"], "dtype": "float32"}, "data must be a flat list of numbers"),
        ({"data": [[1], [2, 3]], "dtype": "float32"}, "data must be a flat list of numbers"),
        ({"data": [2**63], "dtype": "int64"}, "64-bit integers"),
        ({"data": [1], "dtype": "int64", "shape": [-1]}, "negative"),
        ({"data": [1], "dtype": "int64", "sparse_crow_indices": [0, 1]}, "needs both"),
        ({"dtype": "int64"}, "data is required"),
        ([1, 2], "must be an object"),
    ],
)
def test_a_wrong_tensor_keeps_its_place_and_is_named(tensor: object, reason: str) -> None:
    decoded = read_forward_backward(body(pass_body(loss_fn_inputs={"target_tokens": tensor})))
    message = rejection(decoded)
    assert "data[0]: loss_fn_inputs['target_tokens']" in message
    assert reason in message
    assert isinstance(decoded, RejectedRequest)
    assert (decoded.model_id, decoded.seq_id) == ("s:train:0", 1)
    assert decoded.request_type is RequestType.FORWARD_BACKWARD


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        ({"type": "smell", "tokens": [1]}, "'smell' is unknown"),
        ({"tokens": [2**31]}, "must fit 32 bits"),
        ({"tokens": ["a"]}, "flat list"),
        ({"type": "image", "data": "***", "format": "png"}, "not base64"),
        ("text", "must be an object"),
    ],
)
def test_a_wrong_chunk_is_named(chunk: object, reason: str) -> None:
    message = rejection(read_forward_backward(body(pass_body(model_input={"chunks": [chunk]}))))
    assert "data[0]" in message
    assert reason in message


def test_an_image_of_the_oldest_clients_is_no_text() -> None:
    chunk = {"data": "aGk=", "format": "png", "height": 2, "width": 2, "tokens": 3}
    decoded = read_forward_backward(body(pass_body(model_input={"chunks": [chunk, {"tokens": [1]}]})))
    assert isinstance(decoded, ForwardBackwardInput)
    image, text = decoded.data[0].model_input.chunks
    assert isinstance(image, ImageChunk)
    assert image.data == b"hi"
    assert isinstance(text, EncodedTextChunk)


@pytest.mark.parametrize("field", ["model_id", "seq_id"])
def test_a_request_without_a_place_cannot_be_accepted(field: str) -> None:
    request = pass_body()
    del request[field]
    with pytest.raises(InvalidRequestError, match=field):
        read_forward_backward(body(request))


def test_sequence_numbers_begin_at_one() -> None:
    with pytest.raises(UndecodableBodyError, match="seq_id must be at least 1"):
        read_forward_backward(body({**pass_body(), "seq_id": 0}))


@pytest.mark.parametrize("config", [{"beta": True}, {"beta": [1]}])
def test_a_mistyped_loss_config_is_named(config: object) -> None:
    request = pass_body()
    request["forward_backward_input"]["loss_fn_config"] = config
    assert "loss_fn_config['beta']" in rejection(read_forward_backward(body(request)))


# --- steps ------------------------------------------------------------------------------------------------------------


def step(**fields: Any) -> OptimStepInput | RejectedRequest:
    return read_optim_step(body({"model_id": "s:train:0", "seq_id": 2, **fields}))


def test_a_step_that_says_little_gets_the_defaults() -> None:
    decoded = step(adam_params={"learning_rate": 1, "beta1": None})
    assert isinstance(decoded, OptimStepInput)
    assert decoded.adam_params is not None
    assert decoded.adam_params.learning_rate == 1.0
    assert (decoded.adam_params.beta1, decoded.adam_params.eps) == (0.9, 1e-12)


def test_other_families_pass_through() -> None:
    decoded = step(optimizer_params={"type": "dimuon", "learning_rate": 0.1})
    assert isinstance(decoded, OptimStepInput)
    assert decoded.optimizer_params == {"type": "dimuon", "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "exactly one of adam_params and optimizer_params"),
        ({"adam_params": {"learning_rate": "fast"}}, "adam_params.learning_rate must be a number"),
        ({"adam_params": {"amsgrad": True}}, "unknown fields 'amsgrad'"),
        ({"optimizer_params": {"learning_rate": 1}}, "optimizer_params.type"),
        ({"adam_params": [1]}, "adam_params must be an object"),
    ],
)
def test_a_wrong_step_is_rejected_in_its_future(fields: dict[str, Any], reason: str) -> None:
    assert reason in rejection(step(**fields))


def test_an_unknown_field_that_asks_for_nothing_is_no_mistake() -> None:
    assert isinstance(step(adam_params={"amsgrad": False, "decay": None, "extra": 0}), OptimStepInput)


def test_an_unknown_field_elsewhere_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            step(adam_params={}, never_heard_of="x")
    assert [record.getMessage() for record in caplog.records if "never_heard_of" in record.getMessage()] == [
        "clients send the field never_heard_of, which this server does not know; it has no effect"
    ]


# --- models and weights -----------------------------------------------------------------------------------------------


def model(**fields: Any) -> CreateModelInput | RejectedRequest:
    plain = {"session_id": "s", "model_seq_id": 3, "base_model": "tiny", "lora_config": {"rank": 8, "seed": None}}
    return read_create_model(body({**plain, **fields}))


def test_a_model_with_defaults() -> None:
    decoded = model(user_metadata=None)
    assert isinstance(decoded, CreateModelInput)
    assert decoded.lora_config.seed is None
    assert decoded.lora_config.alpha == 32.0
    assert decoded.optimizer_config.type == "adamw"


@pytest.mark.parametrize("targets", ["q_proj, v_proj", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("alpha", ["16", 16, 16.0])
def test_alpha_and_target_modules(alpha: object, targets: object) -> None:
    decoded = model(user_metadata={"tinker_server.lora_alpha": alpha, "tinker_server.target_modules": targets})
    assert isinstance(decoded, CreateModelInput)
    assert decoded.lora_config.alpha == 16.0
    assert decoded.lora_config.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"user_metadata": {"tinker_server.rank": "1"}}, "'tinker_server.lora_alpha', 'tinker_server.target_modules'"),
        ({"user_metadata": {"tinker_server.lora_alpha": "much"}}, "must be a number above 0"),
        ({"user_metadata": {"tinker_server.lora_alpha": -1}}, "must be a number above 0"),
        ({"user_metadata": {"tinker_server.target_modules": ""}}, "names of linears"),
        ({"user_metadata": {"tinker_server.target_modules": [1]}}, "names of linears"),
        ({"lora_config": {"rank": 8, "dropout": 0.1}}, "unknown fields 'dropout'"),
        ({"lora_config": {"rank": "8"}}, "lora_config.rank must be an integer"),
        ({"lora_config": None}, "lora_config is required"),
        ({"base_model": None}, "base_model is required"),
    ],
)
def test_a_wrong_model_fails_in_its_future(fields: dict[str, Any], reason: str) -> None:
    decoded = model(**fields)
    assert reason in rejection(decoded)
    assert isinstance(decoded, RejectedRequest)
    assert (decoded.model_id, decoded.seq_id) == ("s:train:3", 0)


def test_optimizer_families_pass_through() -> None:
    decoded = model(optimizer_config={"type": "dimuon", "version": 1})
    assert isinstance(decoded, CreateModelInput)
    assert (decoded.optimizer_config.type, decoded.optimizer_config.settings) == ("dimuon", {"version": 1.0})


def test_loading_weights_of_the_oldest_clients_leaves_the_optimizer_alone() -> None:
    decoded = read_load_weights(body({"model_id": "s:train:0", "seq_id": 1, "path": "tinker://x/weights/y"}))
    assert isinstance(decoded, LoadWeightsInput)
    assert not decoded.optimizer


def test_a_wrong_load_of_a_new_model_takes_its_first_place() -> None:
    decoded = read_load_weights(body({"session_id": "s", "model_seq_id": 1, "optimizer": True}))
    assert "path is required" in rejection(decoded)
    assert isinstance(decoded, RejectedRequest)
    assert (decoded.model_id, decoded.seq_id) == ("s:train:1", 0)


@pytest.mark.parametrize("fields", [{}, {"path": "a", "sampling_session_seq_id": 1}, {"path": "a", "kind": "odd"}])
def test_a_wrong_sampler_save_is_rejected_in_its_future(fields: dict[str, Any]) -> None:
    rejection(read_save_weights_for_sampler(body({"model_id": "s:train:0", "seq_id": 1, **fields})))


def test_an_ephemeral_save_of_older_clients() -> None:
    request = {"model_id": "s:train:0", "seq_id": 1, "sampling_session_seq_id": 0, "ttl_seconds": None}
    decoded = read_save_weights_for_sampler(body(request))
    assert isinstance(decoded, SaveWeightsForSamplerInput)
    assert decoded.kind.value == "snapshot"


def test_a_save_without_a_name_is_rejected_in_its_future() -> None:
    assert "path is required" in rejection(read_save_weights(body({"model_id": "s:train:0", "seq_id": 1})))


# --- sampling ---------------------------------------------------------------------------------------------------------


def sample(params: dict[str, Any] | None = None, **fields: Any) -> SampleInput | RejectedRequest:
    plain = {"sampling_session_id": "s:sample:0", "seq_id": 999_999_999_000_000_000}
    prompt = {"chunks": [{"tokens": [1, 2]}]}
    return read_asample(body({**plain, "prompt": prompt, "sampling_params": params or {}, **fields}))


@pytest.mark.parametrize(
    ("stop", "condition"),
    [
        (None, StopCondition()),
        ([], StopCondition(at_eos=False)),
        ("x", StopCondition(at_eos=False, texts=("x",))),
        (["x", "y"], StopCondition(at_eos=False, texts=("x", "y"))),
        ([7, 8], StopCondition(at_eos=False, tokens=(7, 8))),
    ],
)
def test_the_forms_of_stop(stop: object, condition: StopCondition) -> None:
    decoded = sample({"stop": stop})
    assert isinstance(decoded, SampleInput)
    assert decoded.sampling_params.stop == condition


@pytest.mark.parametrize(
    ("decoded", "reason"),
    [
        (sample({"stop": [1, "x"]}), "sampling_params.stop must be"),
        (sample({"stop": 1}), "sampling_params.stop must be"),
        (sample({"min_p": 0.1}), "unknown fields 'min_p'"),
        (sample({"temperature": "hot"}), "sampling_params.temperature must be a number"),
        (sample(num_samples=0), "num_samples must be 1 to"),
        (sample(model_path="tinker://x/weights/y"), "open a sampling session"),
        (sample(target_prompt_logprobs={"data": [1, 2], "dtype": "int64", "shape": [3]}), "target_prompt_logprobs"),
        (sample(prompt=None), "prompt is required"),
    ],
)
def test_a_wrong_sample_is_rejected_in_its_future(decoded: object, reason: str) -> None:
    assert reason in rejection(decoded)


def test_a_sampling_session_needs_something_to_sample_from() -> None:
    with pytest.raises(InvalidRequestError, match="base_model or model_path"):
        read_create_sampling_session(body({"session_id": "s", "sampling_session_seq_id": 0, "base_model": None}))


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_a_session_that_says_nothing() -> None:
    assert read_create_session(body({})).tags == ()


def test_tags_are_texts() -> None:
    with pytest.raises(InvalidRequestError, match="tags"):
        read_create_session(body({"tags": [1]}))


def test_lifting_a_ttl_must_be_said() -> None:
    assert read_ttl(body({"ttl_seconds": None})) is None
    assert read_ttl(body({"ttl_seconds": 3600})) == 3600
    with pytest.raises(InvalidRequestError, match="ttl_seconds"):
        read_ttl(body({}))


# --- results as JSON --------------------------------------------------------------------------------------------------


def as_json(output: Any) -> Any:
    encoded = encode(output, JSON)
    assert encoded.media_type == JSON
    return json.loads(encoded.content)


@pytest.mark.parametrize("accept", [JSON, "application/x-protobuf"])
@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (CreateModelOutput(model_id="m"), {"type": "create_model", "model_id": "m"}),
        (OptimStepOutput(metrics={"grad_norm": 1.0}), {"metrics": {"grad_norm": 1.0}}),
        (SaveWeightsOutput(path="tinker://m/weights/a"), {"path": "tinker://m/weights/a"}),
        (SaveWeightsOutput(sampling_session_id="s:sample:0"), {"sampling_session_id": "s:sample:0"}),
        (LoadWeightsOutput(path="p", model_id="m"), {"type": "load_weights", "path": "p", "model_id": "m"}),
        (RequestError(category="user", code="X", message="why"), {"error": "why", "category": "user"}),
    ],
)
def test_small_results_are_json_whatever_is_accepted(accept: str, output: Any, expected: dict[str, Any]) -> None:
    encoded = encode(output, accept)
    assert encoded.media_type == JSON
    assert json.loads(encoded.content) == expected


def test_metrics_that_are_not_finite_survive() -> None:
    assert math.isnan(as_json(OptimStepOutput(metrics={"grad_norm": math.nan}))["metrics"]["grad_norm"])


def test_a_pass_for_older_clients() -> None:
    output = ForwardBackwardOutput(
        loss_fn_outputs=({"logprobs": floats(2), "ids": integers([1, 2])},), metrics={"loss:sum": 2.0}
    )
    answer = as_json(output)
    assert answer["metrics"] == {"loss:sum": 2.0}
    assert answer["loss_fn_outputs"] == [
        {
            "logprobs": {"data": [-1.0, -1.0], "dtype": "float32", "shape": [2]},
            "ids": {"data": [1, 2], "dtype": "int64", "shape": [2]},
        }
    ]


def test_sample_numbers_beyond_64_bits_stay_apart() -> None:
    """As pickled clients of release 0.13.0 send them."""
    first = 340_411_441_286_000_000_000
    numbers = [sample(seq_id=first + i).seq_id for i in range(3)]
    assert numbers[1:] == [numbers[0] + 1, numbers[0] + 2]
    assert 0 <= numbers[0] < 2**63
    assert sample(seq_id=10**18).seq_id == 10**18
    for seq_id in (1e20, 1.5, 10**30):
        with pytest.raises(InvalidRequestError, match="seq_id must be an integer"):
            sample(seq_id=seq_id)


def test_a_sample_for_older_clients() -> None:
    answer = as_json(full_sample())
    assert answer["type"] == "sample"
    assert answer["sequences"][0]["stop_reason"] == "length"
    assert answer["prompt_logprobs"] == [None, None, -1.5]
    assert answer["topk_prompt_logprobs"] == [None, [[10, -2.0], [11, -2.0]], [[12, -2.0], [13, -2.0]]]
