"""What all that is kept on a local file system has in common: flushes, and the words for what it refuses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tinker_core.errors import StorageError


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a directory, durable. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reported(verb: str, what: object) -> Iterator[None]:
    """Turn an `OSError` of a block into a `StorageError` that says what it could not do, and why."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot {verb} {what}: {error.strerror or error}; check free space and permissions of the data directory"
        ) from error
