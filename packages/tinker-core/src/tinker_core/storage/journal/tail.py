"""How far the journal had got, in a file of its own: the witness against commits that vanish.

SQLite drops everything behind a damaged frame of its write-ahead log without a word. The witness is written after each
commit and never synced: it survives the death of the process, and after a power cut it may be old, but it is never
ahead of what was durable. A database behind its witness has lost something.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from zlib import crc32

import attrs

from tinker_core.storage.local_files import sync

_RECORD = struct.Struct("<8s16sQ")
_CHECK = struct.Struct("<I")
_MAGIC = b"tnkrtail"
_NO_ID = bytes(16)


@attrs.frozen
class Witness:
    """What the file says."""

    journal_id: bytes
    commits: int
    """0: nothing has been claimed yet, and the id says nothing either."""


def read_tail(path: Path) -> Witness | None:
    """The witness in a file; None if there is no file. Raises `ValueError` if it is not intact."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) != _RECORD.size + _CHECK.size or crc32(raw[: _RECORD.size]) != _CHECK.unpack_from(raw, _RECORD.size)[0]:
        raise ValueError("its checksum does not fit")
    magic, journal_id, commits = _RECORD.unpack_from(raw)
    if magic != _MAGIC:
        raise ValueError("it is another kind of file")
    return Witness(journal_id, commits)


def create_tail(path: Path) -> None:
    """Make a witness that claims nothing, durably and whole, before there is anything to claim."""
    temporary = path.with_name(f"{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, _encoded(_NO_ID, 0))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.rename(path)
    sync(path.parent)


class Tail:
    """The open file, which must exist. Not safe to call from several threads."""

    def __init__(self, path: Path, journal_id: bytes) -> None:
        self._journal_id = journal_id
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write(self, commits: int) -> None:
        """Say that so many transactions are durable."""
        os.pwrite(self._descriptor, _encoded(self._journal_id, commits), 0)

    def sync(self) -> None:
        """Make the witness itself durable."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _encoded(journal_id: bytes, commits: int) -> bytes:
    record = _RECORD.pack(_MAGIC, journal_id, commits)
    return record + _CHECK.pack(crc32(record))
