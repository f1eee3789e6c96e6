"""Checkpoints as directories on a local file system: whole and durable, or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from tinker_core.errors import StorageError, UnknownCheckpointError
from tinker_core.types import CheckpointType, TinkerPath, check_checkpoint_name

_UNSAFE = re.compile(rb"[^A-Za-z0-9_-]")
_LONGEST_PLAIN = 200

_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)
"""File systems without hard links, or with too many of one file."""

_INCOMING = ".incoming"
"""Saves that are being written and checkpoints that are being deleted."""
_REPLACED = ".replaced"
"""Old checkpoints, under their own names, while new ones take their places."""


def safe_directory_name(model_id: str) -> str:
    """A file name for a model id; different ids never share one, and it never begins with a dot."""
    raw = model_id.encode("utf-8", "surrogatepass")
    name = _UNSAFE.sub(lambda match: b"%%%02X" % match.group()[0], raw).decode("ascii")
    if 0 < len(name) <= _LONGEST_PLAIN:
        return name
    # "%-" is no escape of a byte, so that a shortened name cannot equal a plain one.
    return f"{name[:100]}%-{hashlib.sha256(raw).hexdigest()}"


class CheckpointStore:
    """Checkpoint directories below one root. Blocking; safe to call from several threads.

    A save is `begin`, writing files into the directory that it returns, then `commit` or `abort`. Every method raises
    `StorageError`, with the operating system's reason, when the file system refuses.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._lock = threading.Lock()

    def begin(self, path: TinkerPath) -> Path:
        """A new empty directory, on the root's file system, for the files of a checkpoint that may become ``path``."""
        self._target(path)
        temporary = self._root / _INCOMING / uuid.uuid4().hex
        with _reported("write", path):
            temporary.mkdir(parents=True)
        return temporary

    def commit(self, path: TinkerPath, temporary: Path) -> int:
        """Make what was written the checkpoint ``path`` and return its size in bytes.

        Durable when it returns. A checkpoint of that name is replaced; after a crash half-way the old one is back.
        """
        target = self._target(path)
        replaced = self._root / _REPLACED / target.relative_to(self._root)
        with _reported("write", path):
            size = _sync_tree(self._own(temporary))
            with self._lock:
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    replaced.parent.mkdir(parents=True, exist_ok=True)
                    _remove(replaced)
                    _move(target, replaced)
                    try:
                        _move(temporary, target)
                    except OSError:
                        _move(replaced, target)
                        raise
                    _remove(replaced)
                else:
                    _move(temporary, target)
                self._sync_parents(target)
        return size

    def abort(self, temporary: Path) -> None:
        """Throw away what was written since `begin`."""
        with _reported("remove", temporary):
            _remove(self._own(temporary))

    def directory(self, path: TinkerPath) -> Path:
        """Where the files of a checkpoint lie; raises `UnknownCheckpointError`."""
        target = self._target(path)
        with _reported("read", path):
            if not target.is_dir():
                raise UnknownCheckpointError(str(path))
        return target

    def files(self, path: TinkerPath) -> dict[str, int]:
        """Sizes in bytes of a checkpoint's files by their names below its directory, in order of name.

        Raises `UnknownCheckpointError`.
        """
        directory = self.directory(path)
        with _reported("read", path):
            found = sorted(file for file in directory.rglob("*") if file.is_file())
            return {file.relative_to(directory).as_posix(): file.stat().st_size for file in found}

    def link(self, source: TinkerPath, temporary: Path) -> None:
        """Put a checkpoint's files into a directory of `begin`, without a second copy where the file system can.

        Raises `UnknownCheckpointError`. Files never change once committed, so that sharing them is safe.
        """
        directory, target = self.directory(source), self._own(temporary)
        with _reported("read", source):
            for name in self.files(source):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    (target / name).hardlink_to(directory / name)
                except OSError as error:
                    if error.errno not in _CANNOT_LINK:
                        raise
                    shutil.copyfile(directory / name, target / name)

    def delete(self, path: TinkerPath) -> None:
        """Remove a checkpoint, at once for readers; raises `UnknownCheckpointError`."""
        trash = self._root / _INCOMING / uuid.uuid4().hex
        with _reported("remove", path):
            with self._lock:
                target = self.directory(path)
                trash.parent.mkdir(parents=True, exist_ok=True)
                _move(target, trash)
            _remove(trash)

    def sweep(self) -> None:
        """Clear up after a crash; to be called before the first save. Unfinished replacements are taken back."""
        with _reported("remove", self._root):
            for old in (self._root / _REPLACED).glob("*/*/*"):
                target = self._root / old.relative_to(self._root / _REPLACED)
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _move(old, target)
            _remove(self._root / _REPLACED)
            _remove(self._root / _INCOMING)

    def _target(self, path: TinkerPath) -> Path:
        # A TinkerPath can be made without `parse`, so its parts are checked here, at the last door before the disk.
        return (
            self._root / safe_directory_name(path.run_id) / CheckpointType(path.kind) / check_checkpoint_name(path.name)
        )

    def _own(self, temporary: Path) -> Path:
        if temporary.parent != self._root / _INCOMING:
            raise ValueError(f"{temporary} was not made by begin()")
        return temporary

    def _sync_parents(self, target: Path) -> None:
        for directory in target.parents:
            _sync(directory)
            if directory == self._root:
                break


@contextlib.contextmanager
def _reported(verb: str, what: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot {verb} checkpoint {str(what)!r}: {reason}; check free space and permissions of the data directory"
        ) from error


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory. Raises `StorageError`."""
    with _reported("read", directory):
        return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _sync_tree(directory: Path) -> int:
    """Flush files and directories to disk; returns the size of the files in bytes."""
    size = 0
    for folder, _, names in os.walk(directory, onerror=_raise):
        for name in names:
            file = Path(folder, name)
            _sync(file)
            size += file.stat().st_size
        _sync(Path(folder))
    return size


def _raise(error: OSError) -> None:
    raise error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(source: Path, target: Path) -> None:
    source.rename(target)
    _sync(target.parent)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
