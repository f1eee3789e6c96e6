"""Telling a full disk from a broken one."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinker_core.storage.journal.reserve import NO_SPACE

_IOERR = 10
_IOERR_READ_OR_SYNC = {266, 522, 1034, 1290}
"""READ, SHORT_READ, FSYNC, DIR_FSYNC: never a matter of room, and a failed sync is never tried again."""
_PROBE = bytes(65536)


class OutOfSpaceError(Exception):
    """The disk or the quota has no room; with room the same write would succeed."""


@contextmanager
def out_of_space(directory: Path) -> Iterator[None]:
    """Convert those errors of SQLite and the operating system that mean a full disk to `OutOfSpaceError`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = error.sqlite_errorcode
        if code == sqlite3.SQLITE_FULL:
            raise OutOfSpaceError(str(error)) from error
        if code & 0xFF == _IOERR and code not in _IOERR_READ_OR_SYNC and (reason := _probe(directory)):
            raise OutOfSpaceError(reason) from error
        raise
    except OSError as error:
        if error.errno in NO_SPACE:
            raise OutOfSpaceError(str(error)) from error
        raise


def _probe(directory: Path) -> str | None:
    """Why no file can be written in a directory, if the reason is that there is no room."""
    try:
        with tempfile.TemporaryFile(dir=directory.parent) as file:
            file.write(_PROBE)
            file.flush()
            os.fdatasync(file.fileno())
    except OSError as error:
        return str(error) if error.errno in NO_SPACE else None
    return None
