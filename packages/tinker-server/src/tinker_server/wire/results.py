"""What a future resolved to, as bytes in the form that the poll's ``Accept`` asks for."""

from __future__ import annotations

import json

import attrs

from tinker_core.types import (
    AcceptedRequest,
    CreateCustomLossOutput,
    CreateModelOutput,
    EngineOutput,
    ForwardBackwardOutput,
    JsonObject,
    LoadWeightsOutput,
    OptimStepOutput,
    RequestError,
    SampleOutput,
    SaveWeightsOutput,
    TensorData,
    UnloadModelOutput,
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


LARGE_BYTES = 400_000
"""Payloads beyond this size take long enough to encode that it is done off the event loop."""


def payload_bytes(output: EngineOutput) -> int:
    """About how many bytes of protobuf a result is; 0 for the small ones that never are protobuf."""
    if isinstance(output, ForwardBackwardOutput):
        return sum(_tensor_bytes(tensor) for fields in output.loss_fn_outputs for tensor in fields.values())
    if not isinstance(output, SampleOutput):
        return 0
    tables = [output.topk_prompt_logprobs, *(sequence.topk_logprobs for sequence in output.sequences)]
    tensors = [output.prompt_logprobs, output.target_prompt_logprobs]
    if output.prompt_alt_tokens is not None:
        tensors += [output.prompt_alt_tokens.tokens, output.prompt_alt_tokens.logprobs]
    return (
        sum(_SEQUENCE_BYTES + _TOKEN_BYTES * len(sequence.tokens) for sequence in output.sequences)
        + sum(_TOKEN_BYTES * table.logprobs.data.size for table in tables if table is not None)
        + sum(_tensor_bytes(tensor) for tensor in tensors if tensor is not None)
    )


_TOKEN_BYTES = 8
"""A token id and its logprob."""
_SEQUENCE_BYTES = 16


def _tensor_bytes(tensor: TensorData) -> int:
    indices = (tensor.crow_indices, tensor.col_indices)
    return int(tensor.data.nbytes + sum(part.nbytes for part in indices if part is not None))


def encode(output: EngineOutput, accept: str) -> EncodedResult:
    """Protobuf for passes and samples when ``accept`` has it, JSON for everything else."""
    protobuf = PROTOBUF in accept.lower()
    if isinstance(output, ForwardBackwardOutput):
        return _proto(pass_to_proto(output)) if protobuf else _json(pass_to_json(output))
    if isinstance(output, SampleOutput):
        return _proto(sample_to_proto(output)) if protobuf else _json(sample_to_json(output))
    return _json(_small(output))


def _small(
    output: RequestError
    | CreateModelOutput
    | CreateCustomLossOutput
    | OptimStepOutput
    | SaveWeightsOutput
    | LoadWeightsOutput
    | UnloadModelOutput,
) -> JsonObject:
    match output:
        case RequestError():
            return {"error": output.message, "category": output.category}
        case CreateModelOutput():
            return {"type": "create_model", "model_id": output.model_id}
        case CreateCustomLossOutput():
            return {"type": "create_custom_loss", "loss_id": output.loss_id}
        case OptimStepOutput():
            return {"metrics": dict(output.metrics)}
        case LoadWeightsOutput():
            return {"type": "load_weights", "path": output.path, "model_id": output.model_id}
        case UnloadModelOutput():
            return {"type": "unload_model", "model_id": output.model_id}
        case SaveWeightsOutput():
            named = {"path": output.path, "sampling_session_id": output.sampling_session_id}
            return {key: value for key, value in named.items() if value is not None}


def _proto(content: bytes) -> EncodedResult:
    return EncodedResult(content=content, media_type=PROTOBUF)


def _json(value: JsonObject) -> EncodedResult:
    # Python's own writer: clients read NaN and Infinity, and orjson would turn them into null.
    return EncodedResult(content=json.dumps(value, separators=(",", ":")).encode(), media_type=JSON)
