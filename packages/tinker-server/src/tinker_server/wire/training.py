"""forward_backward and optim_step: what clients send."""

from __future__ import annotations

from collections.abc import Iterable

import google.protobuf.message

from tinker_core.errors import InvalidDatumError, InvalidLossConfigError, InvalidRequestError, TinkerError
from tinker_core.types import (
    AdamParams,
    Datum,
    ForwardBackwardInput,
    LossFnInputs,
    ModelInput,
    OptimStepInput,
    ProvenanceSpan,
    RequestType,
)
from tinker_server.wire.body import Body, UndecodableBodyError
from tinker_server.wire.chunks import chunk_from_proto, model_input_from_json
from tinker_server.wire.fields import Fields, as_object, show
from tinker_server.wire.parts import check_fields, check_parts
from tinker_server.wire.proto import tinker_server_wire_pb2 as pb
from tinker_server.wire.rejected import RejectedRequest, reject
from tinker_server.wire.settings import check_plain
from tinker_server.wire.tensors import tensor_from_json, tensor_from_proto
from tinker_server.wire.unknown import discard_unknown

_ADAM_DEFAULTS = AdamParams()


def place_in_model(fields: Fields) -> tuple[str, int]:
    """Model and sequence number of a training request; without them it belongs nowhere and is refused at once."""
    return _checked_place(fields.text("model_id"), fields.integer("seq_id"))


def _checked_place(model_id: str, seq_id: int) -> tuple[str, int]:
    if not model_id:
        raise UndecodableBodyError("model_id is required; send the id that create_model returned")
    if seq_id < 1:
        raise UndecodableBodyError(f"seq_id must be at least 1, got {seq_id}")
    return model_id, seq_id


# --- forward_backward -------------------------------------------------------------------------------------------------


def read_forward_backward(body: Body, *, forward_only: bool = False) -> ForwardBackwardInput | RejectedRequest:
    """A pass in either form. ``forward_only`` is what the path says; protobuf bodies can say it themselves."""
    if body.is_protobuf:
        data = body.plain()
        check_fields(data, body.max_parts)
        return _pass_from_proto(data, forward_only=forward_only, max_parts=body.max_parts)
    return _pass_from_json(Fields(body.json_object(), ""), forward_only=forward_only)


def _rejected_pass(model_id: str, seq_id: int, forward_only: bool, error: TinkerError) -> RejectedRequest:
    kind = RequestType.FORWARD if forward_only else RequestType.FORWARD_BACKWARD
    return reject(model_id, seq_id, kind, error)


def _pass_from_proto(data: bytes, *, forward_only: bool, max_parts: int) -> ForwardBackwardInput | RejectedRequest:
    try:
        message = pb.ForwardBackwardRequest.FromString(data)
    except google.protobuf.message.DecodeError as error:
        raise UndecodableBodyError(f"the request body is not a ForwardBackwardRequest: {error}") from error
    discard_unknown(message, data)
    model_id, seq_id = _checked_place(message.model_id, message.seq_id)
    forward_only = forward_only or message.forward_only
    try:
        check_parts(message, max_parts)
        return ForwardBackwardInput(
            model_id=model_id,
            seq_id=seq_id,
            data=tuple(_datum_from_proto(index, datum) for index, datum in enumerate(message.data)),
            loss_fn=message.loss_fn,
            loss_fn_config=_loss_config_from_proto(message),
            forward_only=forward_only,
        )
    except TinkerError as error:
        return _rejected_pass(model_id, seq_id, forward_only, error)


def _loss_config_from_proto(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    if not message.loss_fn_config_v2:
        return dict(message.loss_fn_config)
    config: dict[str, float | str] = {}
    for key, value in message.loss_fn_config_v2.items():
        kind = value.WhichOneof("value")
        if kind is None:
            continue
        config[key] = value.text if kind == "text" else value.number
    return config


def _datum_from_proto(index: int, message: pb.Datum) -> Datum:
    chunks = []
    for number, chunk in enumerate(message.model_input):
        try:
            chunks.append(chunk_from_proto(chunk))
        except ValueError as error:
            raise InvalidDatumError(index, f"model_input.chunks[{number}]: {error}") from error
    inputs: LossFnInputs = {}
    for name, tensor in message.loss_fn_inputs.items():
        try:
            inputs[name] = tensor_from_proto(tensor)
        except ValueError as error:
            raise InvalidDatumError(index, f"loss_fn_inputs[{name!r}]: {error}") from error
    return Datum(
        model_input=ModelInput(chunks=tuple(chunks)),
        loss_fn_inputs=inputs,
        model_input_spans=_spans_from_proto(index, message.model_input_spans),
        loss_fn_input_spans=_spans_from_proto(index, message.loss_fn_input_spans),
    )


def _spans_from_proto(index: int, messages: Iterable[pb.ProvenanceSpan]) -> tuple[ProvenanceSpan, ...]:
    spans = []
    for message in messages:
        kind = message.WhichOneof("span")
        if kind is None:
            raise InvalidDatumError(index, "a provenance span is of no known kind")
        span = message.prompt_tokens if kind == "prompt_tokens" else message.sampled_tokens
        spans.append(
            ProvenanceSpan(kind=kind, sequence_id=span.sequence_id, offset=span.offset, length=span.length),
        )
    return tuple(spans)


def _pass_from_json(fields: Fields, *, forward_only: bool) -> ForwardBackwardInput | RejectedRequest:
    model_id, seq_id = place_in_model(fields)
    try:
        key = "forward_input" if fields.has("forward_input") else "forward_backward_input"
        forward_only = fields.boolean("forward_only", forward_only)
        wrapped = Fields(fields.mapping(key), key)
        fields.log_unknown()
        parsed = ForwardBackwardInput(
            model_id=model_id,
            seq_id=seq_id,
            data=tuple(_datum_from_json(index, item) for index, item in enumerate(wrapped.objects("data"))),
            loss_fn=wrapped.text("loss_fn"),
            loss_fn_config=_loss_config_from_json(wrapped.mapping("loss_fn_config", None) or {}),
            forward_only=forward_only,
        )
        wrapped.log_unknown()
    except TinkerError as error:
        return _rejected_pass(model_id, seq_id, forward_only, error)
    return parsed


def _loss_config_from_json(values: dict[str, object]) -> dict[str, float | str]:
    config: dict[str, float | str] = {}
    for key, value in values.items():
        if value is None or value == [] or value == {}:
            continue
        if value is False or isinstance(value, str):
            config[key] = value  # false says nothing for a key that the loss does not know, and is refused for others
        elif isinstance(value, int | float) and value is not True:
            config[key] = float(value)
        else:
            raise InvalidLossConfigError(f"loss_fn_config[{key!r}] must be a number or a text, got {show(value)}")
    return config


def _datum_from_json(index: int, item: object) -> Datum:
    try:
        fields = as_object(item, "datum")
        inputs: LossFnInputs = {}
        for name, tensor in fields.mapping("loss_fn_inputs").items():
            try:
                inputs[name] = tensor_from_json(as_object(tensor, "tensor"))
            except ValueError as error:
                raise InvalidDatumError(index, f"loss_fn_inputs[{name!r}]: {error}") from error
        datum = Datum(
            model_input=model_input_from_json(Fields(fields.mapping("model_input"), "model_input")),
            loss_fn_inputs=inputs,
            model_input_spans=_spans_from_json(fields, "model_input_spans"),
            loss_fn_input_spans=_spans_from_json(fields, "loss_fn_input_spans"),
        )
        fields.log_unknown()
    except InvalidDatumError:
        raise
    except InvalidRequestError as error:
        raise InvalidDatumError(index, str(error)) from error
    return datum


def _spans_from_json(fields: Fields, key: str) -> tuple[ProvenanceSpan, ...]:
    spans = []
    for number, item in enumerate(fields.objects(key, [])):
        span = as_object(item, f"{key}[{number}]")
        spans.append(
            ProvenanceSpan(
                kind=span.text("type"),
                sequence_id=span.text("sequence_id"),
                offset=span.integer("offset", 0),
                length=span.integer("length"),
            )
        )
    return tuple(spans)


# --- optim_step -------------------------------------------------------------------------------------------------------


def read_optim_step(body: Body) -> OptimStepInput | RejectedRequest:
    """An optimizer step: ``adam_params`` for Adam, ``optimizer_params`` with a ``type`` for every other family."""
    fields = Fields(body.json_object(), "")
    model_id, seq_id = place_in_model(fields)
    try:
        adam = fields.mapping("adam_params", None)
        other = fields.mapping("optimizer_params", None)
        if (adam is None) == (other is None):
            raise InvalidRequestError("send exactly one of adam_params and optimizer_params")
        if other is not None:
            Fields(other, "optimizer_params").text("type")  # names the family, and is required
        fields.log_unknown()
        return OptimStepInput(
            model_id=model_id,
            seq_id=seq_id,
            adam_params=None if adam is None else _adam_params(Fields(adam, "adam_params")),
            optimizer_params=None if other is None else dict(check_plain(other, "optimizer_params")),
        )
    except TinkerError as error:
        return reject(model_id, seq_id, RequestType.OPTIM_STEP, error)


def _adam_params(fields: Fields) -> AdamParams:
    params = AdamParams(
        learning_rate=fields.number("learning_rate", _ADAM_DEFAULTS.learning_rate),
        beta1=fields.number("beta1", _ADAM_DEFAULTS.beta1),
        beta2=fields.number("beta2", _ADAM_DEFAULTS.beta2),
        eps=fields.number("eps", _ADAM_DEFAULTS.eps),
        weight_decay=fields.number("weight_decay", _ADAM_DEFAULTS.weight_decay),
        grad_clip_norm=fields.number("grad_clip_norm", _ADAM_DEFAULTS.grad_clip_norm),
    )
    fields.refuse_unknown()
    return params
