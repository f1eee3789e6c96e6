"""Snapshots on disk: the whole state of a model at one place in its order, for nobody but the engine.

Each is a sealed directory below its model's. Which one counts is said by the journal.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from tinker_core.errors import DamagedRecordError
from tinker_core.storage.checkpoints import safe_directory_name
from tinker_core.storage.sealed import make_directory, put_in_place, remove, seal, sealed_name, verify

_UNFINISHED = ".writing-"


class SnapshotFiles:
    """The snapshots of all models of an engine. Blocking; safe to call from several threads for different models.

    Every method raises `StorageError`, with the operating system's reason, when the file system refuses.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def begin(self, model_id: str) -> Path:
        """A new empty directory to write a snapshot into."""
        directory = self._directory(model_id) / f"{_UNFINISHED}{uuid.uuid4().hex}"
        make_directory(directory)
        return directory

    def commit(self, model_id: str, directory: Path) -> str:
        """Make what was written a snapshot and return its name; durable when this returns."""
        name = directory.name.removeprefix(_UNFINISHED)
        seal(directory, model_id)
        put_in_place(directory, directory.with_name(name))
        return name

    def abort(self, directory: Path) -> None:
        """Throw away what was written since `begin`."""
        remove(directory)

    def verified(self, model_id: str, name: str) -> Path:
        """The directory of a snapshot whose files are what was written.

        Raises `DamagedRecordError`, which names the file that is not.
        """
        directory = self._directory(model_id) / name
        verify(directory)
        if sealed_name(directory) != model_id:
            raise DamagedRecordError(f"{directory} is a snapshot of another model than {model_id!r}")
        return directory

    def remove(self, model_id: str, name: str | None = None) -> None:
        """Remove one snapshot of a model, or all of them."""
        directory = self._directory(model_id)
        remove(directory if name is None else directory / name)

    def sweep(self, live: Mapping[str, str | None]) -> None:
        """Clear up after a crash: remove all but the snapshot that the journal names for each live model."""
        if not self._root.is_dir():
            return
        wanted = {self._directory(model_id).name: name for model_id, name in live.items()}
        for directory in self._root.iterdir():
            name = wanted.get(directory.name)
            if name is None:
                remove(directory)
                continue
            for other in directory.iterdir():
                if other.name != name:
                    remove(other)

    def _directory(self, model_id: str) -> Path:
        return self._root / safe_directory_name(model_id)
