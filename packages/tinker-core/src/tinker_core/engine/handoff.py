"""The way of weights from a trainer to a sampler with processes of its own: through memory, without touching a disk."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tinker_core.engine.config import EngineConfig
from tinker_core.errors import ConfigurationError, StorageError
from tinker_core.storage.checkpoints import safe_directory_name


class Handoff:
    """The directories of one base model in a file system in memory."""

    def __init__(self, config: EngineConfig, base_model: str) -> None:
        self._root = config.handoff_dir
        # One place for each data directory, which one server at a time has to itself.
        server = hashlib.sha256(str(config.data_dir.resolve()).encode()).hexdigest()[:16]
        self._own = self._root / f"tinker-{server}"
        self._directory = self._own / safe_directory_name(base_model)

    @property
    def held(self) -> Path:
        """Where the sampler keeps what it serves."""
        return self._directory / "held"

    def clear(self) -> None:
        """Remove what an earlier process left behind; raises `ConfigurationError` where there is no place of our own.

        Everybody may write to a file system in memory, so somebody else may have been there first.
        """
        if not self._root.is_dir():
            raise ConfigurationError(
                f"{self._root} is not there; name a directory with --handoff-dir, best in a file system in memory"
            )
        try:
            self._own.mkdir(mode=0o700, exist_ok=True)
            found = self._own.lstat()
        except OSError as error:
            raise ConfigurationError(f"cannot make {self._own}: {error.strerror}; see --handoff-dir") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigurationError(f"{self._own} is not this user's alone; remove it, or see --handoff-dir")
        shutil.rmtree(self._directory, ignore_errors=True)

    def remove(self) -> None:
        """Leave nothing behind in memory."""
        shutil.rmtree(self._directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # other base models have theirs there too
            self._own.rmdir()

    @asynccontextmanager
    async def incoming(self) -> AsyncIterator[Path]:
        """A new empty directory, removed at the end of the block unless somebody took it; raises `StorageError`."""
        directory = self._directory / "incoming" / uuid.uuid4().hex
        try:
            await asyncio.to_thread(directory.mkdir, parents=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"cannot make {directory}: {error.strerror}; see --handoff-dir") from error
        try:
            yield directory
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
