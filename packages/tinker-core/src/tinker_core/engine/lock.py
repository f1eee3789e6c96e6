"""One engine per data directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinker_core.errors import ConfigurationError


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
