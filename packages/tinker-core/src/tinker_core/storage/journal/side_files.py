"""Payloads too large for the database, one file each.

A file becomes part of the journal with the row that names it and ends after that row is durably gone; what no row
names is swept at open. Numbers are never used twice, so no file is ever written over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from tinker_core.storage.journal.checks import BODY, RESULT
from tinker_core.storage.local_files import sync

_SUFFIXES = {BODY: ".body", RESULT: ".result"}
_KINDS = {suffix: kind for kind, suffix in _SUFFIXES.items()}
_CHUNK = 16 * 1024 * 1024


@attrs.frozen
class SideFile:
    """The name of a payload kept in a file."""

    kind: bytes
    number: int


class SideFiles:
    """The directory of those files. Blocking; safe to call from several threads."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, file: SideFile) -> Path:
        """Where a payload is."""
        return self.directory / f"{file.number:016x}{_SUFFIXES[file.kind]}"

    def write(self, file: SideFile, data: bytes) -> None:
        """Write a payload; its bytes are durable on return, its name only after `sync_directory`. Raises `OSError`."""
        path = self.path(file)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view[:_CHUNK]) :]
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise

    def sync_directory(self) -> None:
        """Make the names of all written files durable."""
        sync(self.directory)

    def read(self, file: SideFile) -> bytes:
        """A payload; raises `OSError`."""
        return self.path(file).read_bytes()

    def remove(self, files: Iterable[SideFile]) -> None:
        """Remove payloads whose rows are gone; one that is not there is fine."""
        for file in files:
            self.path(file).unlink(missing_ok=True)

    def listed(self) -> Iterator[SideFile]:
        """All payloads there are; raises `ValueError` for a file of another name."""
        for entry in os.scandir(self.directory):
            stem, suffix = os.path.splitext(entry.name)
            if suffix not in _KINDS:
                raise ValueError(f"{entry.path!r} is none of the journal's files; move it away")
            yield SideFile(_KINDS[suffix], int(stem, 16))
