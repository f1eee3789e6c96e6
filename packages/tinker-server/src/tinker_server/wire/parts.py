"""Counting what a protobuf pass is made of, because two bytes can ask for an object of hundreds."""

from __future__ import annotations

from typing import Any

from tinker_server.wire.body import TooManyPartsError, UndecodableBodyError
from tinker_server.wire.proto import tinker_server_wire_pb2 as pb

_FIELDS_PER_PART = 8
"""Fields on the wire that one datum, chunk, tensor or span is made of, at most."""
_LENGTH_DELIMITED = 2
_ONE_BYTE = 0x7F
"""The largest number that takes one byte."""
_FIXED = {1: 8, 5: 4}

_Table = dict[int, Any]
"""Field number of each nested message -> its own table."""


def _table_of(descriptor: Any) -> _Table:  # noqa: ANN401 - protobuf has two classes for it
    return {field.number: _table_of(field.message_type) for field in descriptor.fields if field.message_type}


_REQUEST = _table_of(pb.ForwardBackwardRequest.DESCRIPTOR)


def check_fields(data: bytes, max_parts: int) -> None:
    """Raise `TooManyPartsError` for the bytes of a ``ForwardBackwardRequest`` that would unfold into too many objects,
    before they are parsed. What is no protobuf raises `UndecodableBodyError`, unless it is short."""
    allowed = max_parts * _FIELDS_PER_PART
    if len(data) <= 2 * allowed:
        return
    try:
        _count_fields(data, allowed)
    except IndexError:
        raise _broken() from None
    except OverflowError:
        raise TooManyPartsError(max_parts) from None


def _count_fields(data: bytes, allowed: int) -> None:
    """Raise `OverflowError` for too many fields, `IndexError` or `UndecodableBodyError` for broken ones.

    Written for speed: a hostile body makes it go all the way to the limit.
    """
    open_messages: list[tuple[int, _Table]] = []  # where each enclosing message ends, and its table
    position, end, table = 0, len(data), _REQUEST
    while True:
        while position == end:
            if not open_messages:
                return
            end, table = open_messages.pop()
        allowed -= 1
        if allowed < 0:
            raise OverflowError
        tag = data[position]
        position += 1
        if tag > _ONE_BYTE:
            tag, position = _varint(data, position - 1)
        kind = tag & 7
        size = 0
        if kind == _LENGTH_DELIMITED:
            size = data[position]
            position += 1
            if size > _ONE_BYTE:
                size, position = _varint(data, position - 1)
        elif kind == 0:
            _, position = _varint(data, position)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise _broken()  # groups, which the schema does not have
        if position + size > end:
            raise _broken()
        if kind == _LENGTH_DELIMITED and tag >> 3 in table:
            open_messages.append((end, table))
            end, table = position + size, table[tag >> 3]
        else:
            position += size


def check_parts(message: pb.ForwardBackwardRequest, max_parts: int) -> None:
    """Raise `TooManyPartsError` for a parsed request of too many data, chunks, tensors and spans."""
    count = len(message.data)
    if count <= max_parts:
        count += sum(
            len(datum.model_input)
            + len(datum.loss_fn_inputs)
            + len(datum.model_input_spans)
            + len(datum.loss_fn_input_spans)
            for datum in message.data
        )
    if count + len(message.loss_fn_config) + len(message.loss_fn_config_v2) > max_parts:
        raise TooManyPartsError(max_parts)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of at most ten bytes, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte <= _ONE_BYTE:
            return value, position
    raise _broken()


def _broken() -> UndecodableBodyError:
    return UndecodableBodyError("the request body is not a ForwardBackwardRequest: its fields do not add up")
