"""Results of samples."""

from __future__ import annotations

import math

import numpy as np

from tinker_core.types import GeneratedSequence, JsonObject, SampleOutput, StopReason, TopkLogprobs
from tinker_server.wire.proto import tinker_server_wire_pb2 as pb
from tinker_server.wire.tensors import array_bytes, tensor_to_json, tensor_to_proto

_STOP_REASONS = {StopReason.STOP: pb.STOP_REASON_STOP, StopReason.LENGTH: pb.STOP_REASON_LENGTH}
_EMPTY_CELL = -99999.0


def sample_to_proto(output: SampleOutput) -> bytes:
    """A ``SampleResponse`` message."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=output.prompt_cache_hit_tokens)
    for sequence in output.sequences:
        _write_sequence(message.sequences.add(), sequence)
    if output.prompt_logprobs is not None:
        message.prompt_logprobs = array_bytes(output.prompt_logprobs.to_numpy(), "<f4")
    if output.topk_prompt_logprobs is not None:
        _write_topk(message.topk_prompt_logprobs, output.topk_prompt_logprobs)
    if output.target_prompt_logprobs is not None:
        tensor_to_proto(output.target_prompt_logprobs, message.target_prompt_logprobs)
    if output.prompt_alt_tokens is not None:
        tensor_to_proto(output.prompt_alt_tokens.tokens, message.prompt_alt_tokens.tokens)
        tensor_to_proto(output.prompt_alt_tokens.logprobs, message.prompt_alt_tokens.logprobs)
    return message.SerializeToString()


def _write_sequence(message: pb.SampledSequence, sequence: GeneratedSequence) -> None:
    message.stop_reason = _STOP_REASONS[sequence.stop_reason]
    message.tokens = array_bytes(np.asarray(sequence.tokens, dtype=np.int64), "<i4")
    message.logprobs = array_bytes(np.asarray(sequence.logprobs, dtype=np.float32), "<f4")
    if sequence.topk_logprobs is not None:
        _write_topk(message.topk_sampled_logprobs, sequence.topk_logprobs)


def _write_topk(message: pb.TopkLogprobs, topk: TopkLogprobs) -> None:
    length, k = topk.token_ids.shape
    message.token_ids = array_bytes(topk.token_ids.to_numpy(), "<i4")
    message.logprobs = array_bytes(topk.logprobs.to_numpy(), "<f4")
    message.length = length
    message.k = k


def sample_to_json(output: SampleOutput) -> JsonObject:
    """The form that clients before 0.25 read; null where there is no logprob."""
    answer: JsonObject = {"type": "sample", "sequences": [_sequence_to_json(item) for item in output.sequences]}
    if output.prompt_logprobs is not None:
        values = output.prompt_logprobs.to_numpy().tolist()
        answer["prompt_logprobs"] = [None if math.isnan(value) else value for value in values]
    if output.topk_prompt_logprobs is not None:
        answer["topk_prompt_logprobs"] = _topk_to_json(output.topk_prompt_logprobs)
    if output.target_prompt_logprobs is not None:
        answer["target_prompt_logprobs"] = tensor_to_json(output.target_prompt_logprobs)
    if output.prompt_alt_tokens is not None:
        answer["prompt_alt_tokens"] = {
            "tokens": tensor_to_json(output.prompt_alt_tokens.tokens),
            "logprobs": tensor_to_json(output.prompt_alt_tokens.logprobs),
        }
    if output.prompt_cache_hit_tokens:
        answer["prompt_cache_hit_tokens"] = output.prompt_cache_hit_tokens
    return answer


def _sequence_to_json(sequence: GeneratedSequence) -> JsonObject:
    answer: JsonObject = {
        "stop_reason": sequence.stop_reason.value,
        "tokens": list(sequence.tokens),
        "logprobs": list(sequence.logprobs),
    }
    if sequence.topk_logprobs is not None:
        answer["topk_logprobs"] = _topk_to_json(sequence.topk_logprobs)
    return answer


def _topk_to_json(topk: TopkLogprobs) -> list[list[tuple[int, float]] | None]:
    rows: list[list[tuple[int, float]] | None] = []
    for ids, logprobs in zip(topk.token_ids.to_numpy().tolist(), topk.logprobs.to_numpy().tolist(), strict=True):
        cells = [(token, logprob) for token, logprob in zip(ids, logprobs, strict=True) if logprob > _EMPTY_CELL]
        rows.append(cells or None)
    return rows
