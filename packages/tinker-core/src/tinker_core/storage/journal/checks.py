"""Checksums of the journal's records.

Each covers the record's number and kind beside its bytes, so that the bytes of another record do not pass either.
"""

from __future__ import annotations

import struct
from zlib import crc32

_PREFIX = struct.Struct("<1sq")

BODY = b"b"
RESULT = b"r"
_HEAD = b"h"
_LIVE = b"l"
_MODEL = b"m"

Field = int | str | None


def blob_check(kind: bytes, number: int, data: bytes) -> int:
    """Checksum of a body (`BODY`) or result (`RESULT`)."""
    return crc32(data, crc32(_PREFIX.pack(kind, number)))


def head_check(number: int, scope: str, place: int, owner: str, head: bytes) -> int:
    """Checksum of a request's row."""
    return _with_bytes(head, _fields(_HEAD, number, scope, place, owner))


def live_check(number: int, fields: tuple[Field, ...]) -> int:
    """Checksum of the row of a request that is not done with: its model, place, group, state and body."""
    return _fields(_LIVE, number, *fields)


def model_check(model_id: str, next_seq_id: int, state: bytes) -> int:
    """Checksum of a model's row."""
    return _with_bytes(state, _fields(_MODEL, 0, next_seq_id, model_id))


def _with_bytes(data: object, check: int) -> int:
    """A column whose type was damaged gives a sum that no intact row has."""
    return crc32(data, check) if isinstance(data, bytes) else -1


def _fields(kind: bytes, number: int, *fields: Field) -> int:
    return crc32(repr(fields).encode("utf-8", "backslashreplace"), crc32(_PREFIX.pack(kind, number)))
