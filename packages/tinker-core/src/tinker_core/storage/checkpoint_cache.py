"""Checkpoints from afar in a local directory: as many as fit, and those that are being read."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs

from tinker_core.errors import StorageError
from tinker_core.storage.sealed import make_directory, remove, size_on_disk

log = logging.getLogger(__name__)

Fetch = Callable[[str, Path], Awaitable[None]]
"""Puts the files of a location into an empty directory, whole and undamaged, or raises."""


@attrs.define(kw_only=True, eq=False)
class _Entry:
    directory: Path | None = None
    """Where the files are, once they are there."""
    num_bytes: int = 0
    readers: int = 0
    lock: asyncio.Lock = attrs.field(factory=asyncio.Lock)


class CheckpointCache:
    """Fetches each location once while it is kept. What was read longest ago goes first when there is too much.

    ``max_bytes`` bounds what nobody reads; what is being read stays in any case.
    """

    def __init__(self, root: Path, max_bytes: int, fetch: Fetch) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._fetch = fetch
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """Least recently read first."""
        self.num_bytes = 0
        """What all of it takes on disk."""

    @asynccontextmanager
    async def reading(self, location: str) -> AsyncIterator[Path]:
        """The files of a location, which stay for the length of the block. Raises what fetching raises."""
        entry = self._entries.setdefault(location, _Entry())
        self._entries.move_to_end(location)
        entry.readers += 1
        try:
            async with entry.lock:
                directory = entry.directory or await self._add(location, entry)
            yield directory
        finally:
            entry.readers -= 1
            if entry.readers == 0 and entry.directory is None:
                del self._entries[location]  # it could not be fetched
            await self._shrink()

    async def forget(self, location: str) -> None:
        """Give up what is kept of a location, unless somebody reads it."""
        entry = self._entries.get(location)
        if entry is not None and entry.readers == 0:
            await self._evict(location)

    async def _add(self, location: str, entry: _Entry) -> Path:
        directory = self._root / uuid.uuid4().hex
        try:
            await asyncio.to_thread(make_directory, directory)
            await self._fetch(location, directory)
            num_bytes = await asyncio.to_thread(size_on_disk, directory)
        except BaseException:
            await asyncio.to_thread(remove, directory)
            raise
        entry.directory, entry.num_bytes = directory, num_bytes
        self.num_bytes += num_bytes
        return directory

    async def _shrink(self) -> None:
        while self.num_bytes > self._max_bytes:
            idle = (location for location, entry in self._entries.items() if entry.readers == 0)
            oldest = next(idle, None)
            if oldest is None:
                return
            await self._evict(oldest)

    async def _evict(self, location: str) -> None:
        entry = self._entries.pop(location)
        assert entry.directory is not None
        self.num_bytes -= entry.num_bytes
        try:
            await asyncio.to_thread(remove, entry.directory)
        except StorageError as error:
            log.error("a checkpoint that is no longer wanted stays in the cache until the next start: %s", error)
