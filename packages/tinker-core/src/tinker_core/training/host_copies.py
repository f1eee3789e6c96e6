"""Host memory for copies of rows. Training waits for the copy, and fresh pages cost more than the copying."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch


class HostCopies:
    """Copies rows into memory that earlier copies have left. It keeps as much as the largest state has needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []
        self._limit = 0
        """Elements kept at most."""

    def copy(self, row: torch.Tensor) -> torch.Tensor:
        """A float32 row on the CPU with the values of this moment."""
        return self.room(row.numel(), pinned=row.is_cuda).copy_(row.detach())

    def room(self, size: int, *, pinned: bool) -> torch.Tensor:
        """Memory for a float32 row on the CPU; what is in it is not defined."""
        with self._lock:
            for place, buffer in enumerate(self._free):
                if buffer.numel() == size:
                    return self._free.pop(place)
        return torch.empty(size, dtype=torch.float32, pin_memory=pinned)

    def release(self, copies: Sequence[torch.Tensor]) -> None:
        """Give the copies of one state up, which nobody reads any more; from any thread."""
        with self._lock:
            self._free.extend(copies)
            self._limit = max(self._limit, sum(copy.numel() for copy in copies))
            while sum(copy.numel() for copy in self._free) > self._limit:
                del self._free[0]
