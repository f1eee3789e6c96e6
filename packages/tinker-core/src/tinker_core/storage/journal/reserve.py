"""Disk space held back, so that results can still be written when the disk gets full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk or an exhausted quota says."""

_DISK_SHARE = 16
"""At most this part of a disk is held back."""
_MARGIN_SHARE = 8
"""There is room again with this part of the reserve free beside it, so that it does not come and go at the edge."""


class Reserve:
    """A file of a fixed size that holds nothing. Not safe to call from several threads."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._wanted = size
        self.held = 0
        """Bytes held back now."""

    def size(self) -> int:
        """Bytes that should be held back on this disk."""
        stats = os.statvfs(self._path.parent)
        return min(self._wanted, stats.f_frsize * stats.f_blocks // _DISK_SHARE)

    def build(self) -> bool:
        """Hold the space back if there is as much; returns whether it is held and there is room beside it.

        Raises `OSError` for anything but a full disk.
        """
        size = self.size()
        stats = os.statvfs(self._path.parent)
        free = stats.f_frsize * stats.f_bavail + self._allocated()
        if free < size + size // _MARGIN_SHARE:
            return False
        if self.held != size:
            self._allocate(size)
        return self.held == size

    def _allocate(self, size: int) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            self.release()
            return
        finally:
            os.close(descriptor)
        self.held = size

    def release(self) -> None:
        """Give the space away."""
        self._path.unlink(missing_ok=True)
        self.held = 0

    def _allocated(self) -> int:
        try:
            return os.stat(self._path).st_blocks * 512
        except FileNotFoundError:
            return 0
