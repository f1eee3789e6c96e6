"""asample and create_sampling_session: what clients send."""

from __future__ import annotations

import re

from tinker_core.errors import InvalidRequestError, TinkerError, UnsupportedFeatureError
from tinker_core.types import (
    CreateSamplingSessionInput,
    RequestType,
    SampleInput,
    SamplingParams,
    StopCondition,
    TensorData,
)
from tinker_server.wire.body import Body
from tinker_server.wire.chunks import model_input_from_json
from tinker_server.wire.fields import Fields, show
from tinker_server.wire.rejected import RejectedRequest, reject
from tinker_server.wire.tensors import tensor_from_json

_DEFAULTS = SamplingParams()

_LONG_SEQ_ID = re.compile(rb'"seq_id"\s*:\s*([1-9][0-9]{18,21})\s*[,}]')
_FOLDED_SEQ_IDS = 9 * 10**18

MAX_SAMPLES = 16 * 1024
"""Most samples of one request; each has an id from the start."""
MAX_STOPS = 1024
"""Most stop tokens or stop texts of one request: each generated token is compared with all of them."""


def read_create_sampling_session(body: Body) -> CreateSamplingSessionInput:
    """A sampling session on a base model or on saved weights."""
    fields = Fields(body.json_object(), "")
    base_model, model_path = fields.text("base_model", None), fields.text("model_path", None)
    if base_model is None and model_path is None:
        raise InvalidRequestError("send base_model or model_path: one of them says what to sample from")
    request = CreateSamplingSessionInput(
        session_id=fields.text("session_id"),
        sampling_session_seq_id=fields.integer("sampling_session_seq_id"),
        base_model=base_model,
        model_path=model_path,
    )
    fields.log_unknown()
    return request


def read_asample(body: Body) -> SampleInput | RejectedRequest:
    """A sample request."""
    fields = Fields(body.json_object(), "")
    sampling_session_id, seq_id = fields.text("sampling_session_id"), _seq_id(fields, body)
    try:
        _refuse_unsupported(fields)
        request = SampleInput(
            sampling_session_id=sampling_session_id,
            seq_id=seq_id,
            prompt=model_input_from_json(Fields(fields.mapping("prompt"), "prompt")),
            sampling_params=_sampling_params(fields.nested("sampling_params")),
            num_samples=fields.integer("num_samples", 1),
            prompt_logprobs=fields.boolean("prompt_logprobs", False),
            topk_prompt_logprobs=fields.integer("topk_prompt_logprobs", 0),
            topk_sample_logprobs=fields.integer("topk_sample_logprobs", 0),
            prompt_alt_tokens_k=fields.integer("prompt_alt_tokens_k", 0),
            prompt_logprobs_last_n=fields.integer("prompt_logprobs_last_n", None),
            target_prompt_logprobs=_target_tokens(fields),
        )
        fields.log_unknown()
        if not 1 <= request.num_samples <= MAX_SAMPLES:
            raise InvalidRequestError(f"num_samples must be 1 to {MAX_SAMPLES}, got {request.num_samples}")
    except TinkerError as error:
        return reject(sampling_session_id, seq_id, RequestType.SAMPLE, error)
    return request


def read_join(body: Body) -> str:
    """The sampling session that a clone of its client joins."""
    fields = Fields(body.json_object(), "")
    sampling_session_id = fields.text("sampling_session_id")
    fields.log_unknown()
    return sampling_session_id


def _seq_id(fields: Fields, body: Body) -> int:
    """The number of a sample, which only tells it from others of its client.

    Pickled clients of release 0.13.0 begin at a random number of up to 1e21. The JSON parser makes that a float, which
    several numbers share, so the digits themselves are read, and folded into 64 bits by whole blocks of a clone.
    """
    value = fields.raw("seq_id")
    if isinstance(value, float):
        for digits in _LONG_SEQ_ID.findall(body.plain()):
            if float(digits) == value:
                return int(digits) % _FOLDED_SEQ_IDS
    return fields.integer("seq_id")


def _refuse_unsupported(fields: Fields) -> None:
    # Our stable_reinforce needs nothing beyond the logprobs that every sample returns, so there is nothing to record.
    fields.boolean("record_stability_info", False)
    for key in ("base_model", "model_path"):
        if fields.text(key, None) is not None:
            raise UnsupportedFeatureError(f"{key} cannot be sent with a sample; open a sampling session on it")


def _target_tokens(fields: Fields) -> TensorData | None:
    values = fields.mapping("target_prompt_logprobs", None)
    if values is None:
        return None
    try:
        return tensor_from_json(Fields(values, "tensor"))
    except ValueError as error:
        raise InvalidRequestError(f"target_prompt_logprobs: {error}") from error


def _sampling_params(fields: Fields) -> SamplingParams:
    params = SamplingParams(
        max_tokens=fields.integer("max_tokens", None),
        seed=fields.integer("seed", None),
        stop=_stop(fields.raw("stop")),
        temperature=fields.number("temperature", _DEFAULTS.temperature),
        top_k=fields.integer("top_k", _DEFAULTS.top_k),
        top_p=fields.number("top_p", _DEFAULTS.top_p),
    )
    fields.refuse_unknown()
    return params


def _stop(value: object) -> StopCondition:
    """Absent stops at the end of sequence, ``[]`` never stops."""
    if value is None:
        return StopCondition()
    if isinstance(value, str):
        return StopCondition(at_eos=False, texts=(value,))
    if isinstance(value, list) and len(value) <= MAX_STOPS:
        texts = tuple(item for item in value if isinstance(item, str))
        tokens = tuple(item for item in value if isinstance(item, int) and not isinstance(item, bool))
        if len(texts) == len(value) or len(tokens) == len(value):
            return StopCondition(at_eos=False, texts=texts, tokens=tokens)
    raise InvalidRequestError(
        f"sampling_params.stop must be a text, or a list of at most {MAX_STOPS} texts or token ids, got {show(value)}"
    )
