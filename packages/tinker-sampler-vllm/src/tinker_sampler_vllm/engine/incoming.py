"""Weights on their way to an engine on another machine: files in memory, filled piece by piece."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tinker_core.errors import InvalidRequestError, StorageError, UnknownCheckpointError
from tinker_core.storage.checkpoints import safe_directory_name
from tinker_sampler_vllm.protocol import PutCall

_MEMORY = Path("/dev/shm")


def incoming_directory(pid: int) -> Path:
    """Where the engine process of this id keeps them; whoever ends the process removes it."""
    return (_MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())) / f"tinker-incoming-{pid}"


class IncomingWeights:
    """One directory per revision. Its methods block; call them off the event loop."""

    def __init__(self, directory: Path) -> None:
        """Whatever is in the directory is removed."""
        self._directory = directory
        self.clear()

    def put(self, call: PutCall) -> None:
        """Take a piece; one with offset 0 begins a file, and each other one continues where the last one ended.

        Raises `InvalidRequestError`, or `StorageError` when the memory is full.
        """
        if Path(call.name).name != call.name or not call.name.strip("."):
            raise InvalidRequestError(f"{call.name!r} is no plain file name")
        directory = self._of(call.revision)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (directory / call.name).open("ab" if call.offset else "wb") as file:
                if call.offset != file.tell():
                    raise InvalidRequestError(f"{call.name} has {file.tell()} bytes, and not the {call.offset} before")
                file.write(call.data)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise StorageError(f"cannot take {call.revision} into {self._directory}: {error.strerror}") from error

    def directory(self, revision: str) -> Path:
        """The files of a revision; raises `UnknownCheckpointError` when none came."""
        directory = self._of(revision)
        if not directory.is_dir():
            raise UnknownCheckpointError(revision)
        return directory

    def forget(self, revision: str) -> None:
        """Drop the files of a revision."""
        shutil.rmtree(self._of(revision), ignore_errors=True)

    def clear(self) -> None:
        """Drop all."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _of(self, revision: str) -> Path:
        return self._directory / safe_directory_name(revision)
