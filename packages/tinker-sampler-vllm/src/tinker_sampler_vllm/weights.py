"""The weights that engines serve, kept in memory of this machine: engines come and go, and are given them again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tinker_core.errors import CheckpointMismatchError, StorageError, UnknownCheckpointError
from tinker_core.storage.checkpoints import safe_directory_name
from tinker_core.types import Transport, WeightsRef
from tinker_sampler_vllm.protocol import LoadCall


class HeldWeights:
    """One directory per revision, in a file system in memory. Its methods block; call them off the event loop."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[str, Path] = {}

    def open(self) -> None:
        """Make the directory; whatever an earlier process left in it is removed. Raises `StorageError`."""
        shutil.rmtree(self._directory, ignore_errors=True)
        try:
            self._directory.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"cannot make {self._directory}: {error.strerror}; choose another --handoff-dir"
            ) from error

    def __contains__(self, revision: str) -> bool:
        return revision in self._held

    def take(self, revision: str, ref: WeightsRef) -> None:
        """Keep weights under a new name; SHARED_MEMORY ones are moved, and FILE ones are copied.

        Raises `CheckpointMismatchError` or `StorageError`.
        """
        if ref.directory is None or ref.transport not in (Transport.SHARED_MEMORY, Transport.FILE):
            raise CheckpointMismatchError(f"vLLM cannot be given weights by {ref.transport}")
        target = self._directory / safe_directory_name(revision)
        try:
            if ref.transport is Transport.SHARED_MEMORY and _same_file_system(Path(ref.directory), self._directory):
                os.rename(ref.directory, target)
            else:
                shutil.copytree(ref.directory, target)
                if ref.transport is Transport.SHARED_MEMORY:
                    shutil.rmtree(ref.directory)
        except OSError as error:
            shutil.rmtree(target, ignore_errors=True)
            raise StorageError(
                f"cannot keep {revision} in {self._directory}: {error.strerror}; it holds the weights that are sampled "
                "from: lower --max-revisions, enlarge it, or choose another --handoff-dir"
            ) from error
        self._held[revision] = target

    def directory(self, revision: str) -> Path:
        """Where a revision's files are; raises `UnknownCheckpointError`."""
        if revision not in self._held:
            raise UnknownCheckpointError(revision)
        return self._held[revision]

    def call(self, revision: str) -> LoadCall:
        """What an engine is told to load."""
        directory = self.directory(revision)
        full = not (directory / "adapter_config.json").exists()
        return LoadCall(revision=revision, full=full, directory=str(directory))

    def save(self, revision: str, directory: Path) -> None:
        """Copy a revision into an existing empty directory; raises `StorageError` or `UnknownCheckpointError`."""
        source = self.directory(revision)
        if not directory.is_dir():
            raise StorageError(f"cannot write {revision}: {directory} is not there")
        try:
            for path in sorted(source.iterdir()):
                shutil.copyfile(path, directory / path.name)
        except OSError as error:
            raise StorageError(f"cannot write {revision} to {directory}: {error.strerror}") from error

    def forget(self, revision: str) -> None:
        """Drop a revision's files."""
        directory = self._held.pop(revision, None)
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """Drop everything."""
        self._held.clear()
        shutil.rmtree(self._directory, ignore_errors=True)


def _same_file_system(first: Path, second: Path) -> bool:
    return first.stat().st_dev == second.stat().st_dev
