"""Recorded traffic of the SDK: every request decodes, and what we encode decodes to what was recorded."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from tinker.proto import response_conv, tinker_public_pb2

from tests.server.conftest import CAPTURES
from tinker_core.types import (
    CreateModelInput,
    CreateSamplingSessionInput,
    EncodedTextChunk,
    ForwardBackwardInput,
    ForwardBackwardOutput,
    GeneratedSequence,
    ImageChunk,
    LoadWeightsInput,
    OptimStepInput,
    PromptAltTokens,
    SampleInput,
    SampleOutput,
    SaveWeightsForSamplerInput,
    SaveWeightsInput,
    StopReason,
    TensorData,
    TensorDType,
    TopkLogprobs,
)
from tinker_server.wire.body import PROTOBUF, Body
from tinker_server.wire.models import read_create_model
from tinker_server.wire.proto import tinker_server_wire_pb2
from tinker_server.wire.results import encode
from tinker_server.wire.sampling import read_asample, read_create_sampling_session
from tinker_server.wire.sessions import read_create_session, read_finish
from tinker_server.wire.training import read_forward_backward, read_optim_step
from tinker_server.wire.weights import read_load_weights, read_save_weights, read_save_weights_for_sampler

READERS: dict[str, tuple[Any, type]] = {
    "create_model": (read_create_model, CreateModelInput),
    "forward_backward": (read_forward_backward, ForwardBackwardInput),
    "optim_step": (read_optim_step, OptimStepInput),
    "save_weights": (read_save_weights, SaveWeightsInput),
    "save_weights_for_sampler": (read_save_weights_for_sampler, SaveWeightsForSamplerInput),
    "load_weights": (read_load_weights, LoadWeightsInput),
    "create_sampling_session": (read_create_sampling_session, CreateSamplingSessionInput),
    "asample": (read_asample, SampleInput),
}


def body_of(capture: dict[str, Any]) -> Body:
    request = capture["request"]
    if capture["content_type"] == PROTOBUF:
        message = json_format.ParseDict(request["decoded"], tinker_public_pb2.ForwardBackwardRequest())
        return Body(data=message.SerializeToString(), content_type=PROTOBUF)
    return Body(data=json.dumps(request).encode())


def captured(name: str) -> dict[str, Any]:
    found: dict[str, Any]
    (found,) = [capture for capture in CAPTURES if capture["name"].startswith(name)]
    return found


SUBMISSIONS = [capture for capture in CAPTURES if capture["path"].removeprefix("/api/v1/") in READERS]


@pytest.mark.parametrize("capture", SUBMISSIONS, ids=lambda capture: capture["name"])
def test_every_submission_decodes(capture: dict[str, Any]) -> None:
    reader, kind = READERS[capture["path"].removeprefix("/api/v1/")]
    assert isinstance(reader(body_of(capture)), kind)


def test_the_schema_has_the_numbers_of_the_sdk() -> None:
    ours, theirs = tinker_server_wire_pb2.DESCRIPTOR, tinker_public_pb2.DESCRIPTOR
    for name, message in ours.message_types_by_name.items():
        fields = {field.number: (field.name, field.type) for field in message.fields}
        assert fields == {field.number: (field.name, field.type) for field in theirs.message_types_by_name[name].fields}


def test_a_pass() -> None:
    decoded = read_forward_backward(body_of(captured("06-")))
    assert isinstance(decoded, ForwardBackwardInput)
    assert (decoded.model_id, decoded.seq_id, decoded.loss_fn) == ("sess-1:train:0", 1, "cross_entropy")
    assert decoded.data[0].model_input.text_tokens().tolist() == [1, 2, 3, 4]
    inputs = decoded.data[1].loss_fn_inputs
    assert inputs["target_tokens"].to_numpy().tolist() == [2, 3, 4, 5, 6, 7]
    assert inputs["weights"].to_numpy().tolist() == [0, 1, 1, 1, 1, 1]
    assert not decoded.forward_only


def test_numbers_and_texts_of_the_loss_config() -> None:
    decoded = read_forward_backward(body_of(captured("12-")))
    assert isinstance(decoded, ForwardBackwardInput)
    assert decoded.loss_fn_config == {"kl_coeff": 0.01, "mode": "text"}
    (datum,) = decoded.data
    assert [span.kind for span in datum.model_input_spans] == ["prompt_tokens", "sampled_tokens"]
    assert [(span.offset, span.length) for span in datum.loss_fn_input_spans] == [(1, 1), (0, 2)]


def test_the_numbers_of_older_clients_are_read_when_there_is_nothing_else() -> None:
    message = tinker_public_pb2.ForwardBackwardRequest(model_id="s:train:0", seq_id=1, loss_fn="ppo")
    message.loss_fn_config["clip_low_threshold"] = 0.5
    decoded = read_forward_backward(Body(data=message.SerializeToString(), content_type=PROTOBUF))
    assert isinstance(decoded, ForwardBackwardInput)
    assert decoded.loss_fn_config == {"clip_low_threshold": 0.5}


def test_images_and_sparse_targets() -> None:
    decoded = read_forward_backward(body_of(captured("14-")))
    assert isinstance(decoded, ForwardBackwardInput)
    assert decoded.forward_only
    text, image = decoded.data[0].model_input.chunks
    assert isinstance(text, EncodedTextChunk)
    assert isinstance(image, ImageChunk)
    assert (image.format, image.expected_tokens) == ("png", 3)
    targets = decoded.data[0].loss_fn_inputs["target_tokens"]
    assert targets.is_sparse
    assert targets.to_numpy().tolist() == [[5, 0, 0], [0, 0, 6]]


def test_an_optimizer_step() -> None:
    decoded = read_optim_step(body_of(captured("08-")))
    assert isinstance(decoded, OptimStepInput)
    assert decoded.adam_params is not None
    assert (decoded.adam_params.learning_rate, decoded.adam_params.weight_decay) == (0.001, 0.01)


def test_a_sample_with_everything() -> None:
    decoded = read_asample(body_of(captured("26-")))
    assert isinstance(decoded, SampleInput)
    assert decoded.sampling_params.stop.tokens == (7, 8)
    assert decoded.target_prompt_logprobs is not None
    assert decoded.target_prompt_logprobs.to_numpy().tolist() == [[4], [-1]]
    assert (decoded.prompt_logprobs_last_n, decoded.prompt_alt_tokens_k) == (1, 2)
    assert (decoded.topk_prompt_logprobs, decoded.topk_sample_logprobs) == (2, 3)


def test_sessions() -> None:
    session = read_create_session(body_of(captured("02-")))
    assert (session.project_id, session.display_name) == ("proj-1", "cap run")
    assert session.user_metadata == {"who": "cap"}
    finish = read_finish(body_of(captured("47-")))
    assert (finish.reason, finish.detail) == ("success", "bye")


# --- results ----------------------------------------------------------------------------------------------------------


def floats(*shape: int, value: float = -1.0) -> TensorData:
    return TensorData.from_numpy(np.full(shape, value, dtype=np.float32))


def integers(values: list[Any]) -> TensorData:
    return TensorData.from_numpy(np.array(values, dtype=np.int64))


def test_the_result_of_a_pass_is_byte_for_byte_the_recorded_message() -> None:
    metrics = {"loss:sum": 4.0, "tokens:sum": 2.0, "m:mean": 2.0, "mx:max": 2.0}
    output = ForwardBackwardOutput(loss_fn_outputs=({"logprobs": floats(4)}, {"logprobs": floats(6)}), metrics=metrics)
    encoded = encode(output, PROTOBUF)
    assert encoded.media_type == PROTOBUF
    ours = tinker_public_pb2.ForwardBackwardOutput.FromString(encoded.content)
    recorded = base64.b64decode(captured("07-")["response_base64"])
    assert ours == tinker_public_pb2.ForwardBackwardOutput.FromString(recorded)


def test_datums_of_different_width_come_back_in_order() -> None:
    sparse = TensorData(
        dtype=TensorDType.FLOAT32,
        shape=(2, 3),
        data=np.array([-5, -6], np.float32),
        crow_indices=np.array([0, 1, 2]),
        col_indices=np.array([0, 2]),
    )
    shapes = [floats(2), floats(3), floats(2, 4), sparse, floats(1, 4), floats(0)]
    output = ForwardBackwardOutput(
        loss_fn_outputs=tuple({"logprobs": shape} for shape in shapes), metrics={"loss:sum": 1.0}
    )
    decoded = response_conv.deserialize_forward_backward_output(encode(output, PROTOBUF).content)
    assert [fields["logprobs"].shape for fields in decoded.loss_fn_outputs] == [[2], [3], [2, 4], [2, 3], [1, 4], [0]]
    assert decoded.loss_fn_outputs[3]["logprobs"].tolist() == [[-5, 0, 0], [0, 0, -6]]


def test_a_pass_over_no_data() -> None:
    output = ForwardBackwardOutput(loss_fn_outputs=(), metrics={"loss:sum": 0.0})
    decoded = response_conv.deserialize_forward_backward_output(encode(output, PROTOBUF).content)
    assert decoded.loss_fn_outputs == []
    assert decoded.metrics == {"loss:sum": 0.0}


def full_sample() -> SampleOutput:
    nan = np.array([np.nan, np.nan, -1.5], np.float32)
    empty = np.full((1, 2), -99999.0, np.float32)
    return SampleOutput(
        sequences=(
            GeneratedSequence(
                stop_reason=StopReason.LENGTH,
                tokens=(5, 6),
                logprobs=(-0.5, -0.25),
                topk_logprobs=TopkLogprobs(token_ids=integers([[5, 1, 2], [6, 1, 2]]), logprobs=floats(2, 3)),
            ),
            GeneratedSequence(stop_reason=StopReason.STOP, tokens=(7,), logprobs=(-0.125,)),
        ),
        prompt_logprobs=TensorData.from_numpy(nan),
        topk_prompt_logprobs=TopkLogprobs(
            token_ids=integers([[0, 0], [10, 11], [12, 13]]),
            logprobs=TensorData.from_numpy(np.concatenate([empty, np.full((2, 2), -2, np.float32)])),
        ),
        target_prompt_logprobs=TensorData.from_numpy(np.array([[-3.0], [0.0]], np.float32)),
        prompt_alt_tokens=PromptAltTokens(tokens=integers([[1, 2], [3, 4]]), logprobs=floats(2, 2)),
        prompt_cache_hit_tokens=2,
    )


def test_the_sdk_reads_every_part_of_a_sample() -> None:
    decoded = response_conv.deserialize_sample_response(encode(full_sample(), f"{PROTOBUF}, application/json").content)
    first, second = decoded.sequences
    assert (first.stop_reason, first.tokens, first.logprobs) == ("length", [5, 6], [-0.5, -0.25])
    assert (second.stop_reason, second.tokens) == ("stop", [7])
    assert decoded.prompt_logprobs == [None, None, -1.5]
    assert decoded.topk_prompt_logprobs == [None, [(10, -2.0), (11, -2.0)], [(12, -2.0), (13, -2.0)]]
    assert decoded.target_prompt_logprobs is not None
    assert decoded.target_prompt_logprobs.tolist() == [[-3.0], [0.0]]
    assert decoded.prompt_alt_tokens is not None
    assert decoded.prompt_alt_tokens.tokens.tolist() == [[1, 2], [3, 4]]
    assert decoded.prompt_cache_hit_tokens == 2
    recorded = response_conv.deserialize_sample_response(base64.b64decode(captured("27-")["response_base64"]))
    assert recorded.target_prompt_logprobs is not None
    assert type(recorded.target_prompt_logprobs) is type(decoded.target_prompt_logprobs)
