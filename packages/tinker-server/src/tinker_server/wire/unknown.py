"""Fields that clients send and this server does not know: logged once, and told to whoever counts them.

The names are a client's own words.  What reaches a log or a counter has the shape of a name, and only so many different
names are ever told apart.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
from collections.abc import Callable, Iterator

import google.protobuf.message
from google.protobuf.unknown_fields import UnknownFieldSet

_LOGGER = logging.getLogger(__name__)

MAX_NAMES = 100
"""Names that are told apart; all others are `OTHER`."""
OTHER = "other"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]-]{0,79}")
_INDEX = re.compile(r"\[\d+\]")

_recorder: contextvars.ContextVar[Callable[[str], None] | None] = contextvars.ContextVar("unknown_fields", default=None)
_known_names: set[str] = set()


@contextlib.contextmanager
def recording(recorder: Callable[[str], None]) -> Iterator[None]:
    """Tell ``recorder`` the name of each unknown field that is read inside of the block."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def note_unknown(name: str) -> None:
    """A field without effect, by its dotted name; indices of lists are left out of it."""
    label = _label(name)
    if label not in _known_names:
        _known_names.add(label)
        _LOGGER.warning("clients send the field %s, which this server does not know; it has no effect", label)
    recorder = _recorder.get()
    if recorder is not None:
        recorder(label)


def _label(name: str) -> str:
    label = _INDEX.sub("[]", name[:200])
    if label in _known_names:
        return label
    return label if _NAME.fullmatch(label) and len(_known_names) < MAX_NAMES else OTHER


def discard_unknown(message: google.protobuf.message.Message, data: bytes) -> None:
    """Drop and note the fields, at any depth, that the schema of a message parsed from ``data`` does not have."""
    message.DiscardUnknownFields()
    if message.ByteSize() != len(data):  # something is gone, or was not written as briefly as it could be
        _note_numbers(type(message).FromString(data))


def _note_numbers(message: google.protobuf.message.Message) -> None:
    unknown = UnknownFieldSet(message)
    for index in range(min(len(unknown), MAX_NAMES)):
        note_unknown(f"{message.DESCRIPTOR.name}.{unknown[index].field_number}")
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        if descriptor.message_type.GetOptions().map_entry:
            values = value.values() if descriptor.message_type.fields_by_name["value"].message_type else ()
        else:
            values = (value,) if isinstance(value, google.protobuf.message.Message) else value
        for inner in values:
            _note_numbers(inner)
