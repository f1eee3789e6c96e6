"""What a future resolved to, as bytes in the form that the poll's ``Accept`` asks for."""

from __future__ import annotations

import json

import attrs

from tinker_core.types import (
    AcceptedRequest,
    CreateModelOutput,
    EngineOutput,
    ForwardBackwardOutput,
    JsonObject,
    LoadWeightsOutput,
    OptimStepOutput,
    RequestError,
    SampleOutput,
    SaveWeightsOutput,
)
from tinker_server.wire.body import JSON, PROTOBUF
from tinker_server.wire.pass_results import pass_to_json, pass_to_proto
from tinker_server.wire.sample_results import sample_to_json, sample_to_proto


@attrs.frozen(kw_only=True)
class EncodedResult:
    """A response body and its content type."""

    content: bytes
    media_type: str


def receipt(accepted: AcceptedRequest) -> JsonObject:
    """The answer to a submission (SDK "untyped future")."""
    answer: JsonObject = {"request_id": accepted.request_id, "model_id": accepted.model_id}
    if accepted.sample_sequence_ids is not None:
        answer["sample_sequence_ids"] = list(accepted.sample_sequence_ids)
    return answer


def is_large(output: EngineOutput) -> bool:
    """Whether encoding takes long enough to be done off the event loop."""
    if isinstance(output, ForwardBackwardOutput):
        return sum(tensor.data.size for fields in output.loss_fn_outputs for tensor in fields.values()) > 250_000
    if isinstance(output, SampleOutput):
        generated = sum(len(sequence.tokens) for sequence in output.sequences)
        prompt = output.topk_prompt_logprobs.logprobs.data.size if output.topk_prompt_logprobs else 0
        return generated > 50_000 or prompt > 100_000
    return False


def encode(output: EngineOutput, accept: str) -> EncodedResult:
    """Protobuf for passes and samples when ``accept`` has it, JSON for everything else."""
    protobuf = PROTOBUF in accept.lower()
    if isinstance(output, ForwardBackwardOutput):
        return _proto(pass_to_proto(output)) if protobuf else _json(pass_to_json(output))
    if isinstance(output, SampleOutput):
        return _proto(sample_to_proto(output)) if protobuf else _json(sample_to_json(output))
    return _json(_small(output))


def _small(
    output: RequestError | CreateModelOutput | OptimStepOutput | SaveWeightsOutput | LoadWeightsOutput,
) -> JsonObject:
    match output:
        case RequestError():
            return {"error": output.message, "category": output.category}
        case CreateModelOutput():
            return {"type": "create_model", "model_id": output.model_id}
        case OptimStepOutput():
            return {"metrics": dict(output.metrics)}
        case LoadWeightsOutput():
            return {"type": "load_weights", "path": output.path, "model_id": output.model_id}
        case SaveWeightsOutput():
            named = {"path": output.path, "sampling_session_id": output.sampling_session_id}
            return {key: value for key, value in named.items() if value is not None}


def _proto(content: bytes) -> EncodedResult:
    return EncodedResult(content=content, media_type=PROTOBUF)


def _json(value: JsonObject) -> EncodedResult:
    # Python's own writer: clients read NaN and Infinity, and orjson would turn them into null.
    return EncodedResult(content=json.dumps(value, separators=(",", ":")).encode(), media_type=JSON)
