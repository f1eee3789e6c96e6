"""One engine per data directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinker_core.errors import ConfigurationError

_PRIVATE = ("journal", "snapshots", "revisions")
"""What holds the data and weights of all users."""


def make_data_dir(data_dir: Path) -> None:
    """Make a data directory, and the parts of it that nobody else on the machine may read."""
    data_dir.mkdir(parents=True, exist_ok=True)
    for name in _PRIVATE:
        (data_dir / name).mkdir(mode=0o700, exist_ok=True)


def is_locked(data_dir: Path) -> bool:
    """Whether a process holds a data directory now."""
    try:
        descriptor = os.open(data_dir / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def data_dir_lock(data_dir: Path) -> Iterator[None]:
    """Hold a data directory; raises `ConfigurationError` while another process holds it.

    The lock belongs to the open file, so it goes with the process that made it, however that ends.
    """
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"another server uses the data directory {str(data_dir)!r}; stop it, or choose another with --data-dir"
            ) from error
        yield
    finally:
        os.close(descriptor)
