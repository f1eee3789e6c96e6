"""Checkpoints on a local file system, or one that is mounted like one: read where they lie."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tinker_core.errors import DamagedRecordError, StorageError
from tinker_core.storage.checkpoint_files import check_names, is_sealed, local_sizes
from tinker_core.storage.local_files import reported, sync
from tinker_core.storage.sealed import sealed_name, verify

_INCOMING = ".incoming"
"""Saves that are being written."""
_REPLACED = ".replaced"
"""Old checkpoints that an older release was about to replace when it died."""


class LocalFiles:
    """Implements `FileStore` below one root. A rename publishes; nothing is copied for reading.

    With a ``server_id``, other servers may use the same root.
    """

    def __init__(self, root: Path, server_id: str | None = None) -> None:
        self._root = root.resolve()
        self._is_shared = server_id is not None
        self._incoming = _INCOMING if server_id is None else f"{_INCOMING}-{server_id}"
        self._lock = threading.Lock()
        """Held while directories above checkpoints come and go."""

    def __str__(self) -> str:
        return str(self._root)

    @property
    def work_directory(self) -> Path:
        """On the root's own file system, so that a rename can publish."""
        return self._root / self._incoming

    async def open(self) -> None:
        """Remove unfinished saves, and take back what an older release left half replaced."""
        await asyncio.to_thread(self._sweep)

    async def publish(self, directory: Path, location: str) -> None:
        """Move a directory to its location, durably."""
        await asyncio.to_thread(self._publish, directory, location)

    async def remove(self, location: str) -> None:
        """Remove a directory, and those above it that are empty then."""
        await asyncio.to_thread(self._remove, location)

    async def sizes(self, location: str) -> dict[str, int]:
        """What lies at a location."""

        def find() -> dict[str, int]:
            with reported("read", f"checkpoint {location}"):
                return local_sizes(self._root / location)

        return await asyncio.to_thread(find)

    @asynccontextmanager
    async def reading(self, location: str, *, verify: bool) -> AsyncIterator[Path]:
        """The directory itself."""
        yield await asyncio.to_thread(self._find, location, verify)

    def _find(self, location: str, verified: bool) -> Path:
        directory = self._root / location
        with reported("read", f"checkpoint {location}"):
            if not directory.is_dir():
                raise StorageError(f"cannot read checkpoint {location}: its files are gone from {self}")
            if verified and is_sealed(location):
                check_sealed(directory, location)
        return directory

    def _publish(self, directory: Path, location: str) -> None:
        target = self._root / location
        with reported("write", f"checkpoint {location}"), self._lock:
            target.parent.mkdir(parents=True, exist_ok=True)
            directory.rename(target)
            for parent in target.parents:
                sync(parent)
                if parent == self._root:
                    break

    def _remove(self, location: str) -> None:
        target = self._root / location
        with reported("remove", f"checkpoint {location}"), self._lock:
            if target.exists():
                shutil.rmtree(target)
            for parent in target.parents:
                if parent == self._root or not parent.exists() or any(parent.iterdir()):
                    break
                parent.rmdir()

    def _sweep(self) -> None:
        with reported("remove", "checkpoint of an unfinished save"):
            if not self._is_shared:
                self._take_back()
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.work_directory)

    def _take_back(self) -> None:
        for old in (self._root / _REPLACED).glob("*/*/*"):
            target = self._root / old.relative_to(self._root / _REPLACED)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                old.rename(target)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._root / _REPLACED)


def check_sealed(directory: Path, location: str) -> None:
    """Raise `DamagedRecordError` unless a directory holds what was sealed for a location. Blocking.

    Raises `StorageError` for a file that no checkpoint consists of.
    """
    verify(directory)
    if sealed_name(directory) != location:
        raise DamagedRecordError(f"{directory} holds the files of another checkpoint than {location!r}")
    check_names(local_sizes(directory), location)
