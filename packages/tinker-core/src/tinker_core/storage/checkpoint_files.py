"""What is done with the files of checkpoints, wherever they are kept, and which files a checkpoint may consist of."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path, PurePosixPath
from typing import Protocol

from tinker_core.errors import StorageError
from tinker_core.storage.sealed import SEAL_FILE

FILE_TYPES = (".safetensors", ".json", ".age", ".npz")
"""Tensors, plain data, and either of them encrypted. ``.npz`` is numpy's, read without its pickled objects."""

_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)
"""File systems without hard links, or with too many of one file."""


class FileStore(Protocol):
    """Keeps sealed directories, each at a location of its own: a relative path with slashes, never used twice.

    Locations without a seal are of older releases: they are read and removed, never written. Every method raises
    `StorageError`, with the store's reason, when the store refuses.
    """

    @property
    def work_directory(self) -> Path:
        """Where directories are written before they are published: a local directory that is nobody else's."""

    async def open(self) -> None:
        """Clear up what a crash has left of this server's own; to be called once, before anything else."""

    async def publish(self, directory: Path, location: str) -> None:
        """Keep a sealed directory of the work directory, durably. After a failure a part of it may be there."""

    async def remove(self, location: str) -> None:
        """Remove what is at a location, whole or not; nothing there is fine."""

    async def sizes(self, location: str) -> dict[str, int]:
        """Bytes of the files at a location by name, in order of name; none for a location without files."""

    def reading(self, location: str, *, verify: bool) -> AbstractAsyncContextManager[Path]:
        """A local directory with the files of a location, for the length of a block.

        With ``verify`` the files are what was sealed, else `DamagedRecordError` is raised, which names the file. What
        comes from afar is always verified.
        """


def is_sealed(location: str) -> bool:
    """Whether there must be a seal at a location: ``run/versions/kind/name/version``, not ``run/kind/name``."""
    return location.count("/") == 4


def is_allowed(name: str) -> bool:
    """Whether a file of this name may belong to a checkpoint."""
    parts = name.split("/")
    return PurePosixPath(name).suffix in FILE_TYPES and not any(part in ("", ".", "..") for part in parts)


def check_names(names: Iterable[str], what: object) -> None:
    """Raise `StorageError` for a file that no checkpoint consists of."""
    for name in names:
        if not is_allowed(name):
            raise StorageError(
                f"{str(what)!r} has a file {name!r}; checkpoints consist of {', '.join(FILE_TYPES)} files only, for "
                "others could run code when they are read"
            )


def local_sizes(directory: Path) -> dict[str, int]:
    """Bytes of a directory's files by name, in order of name, without the seal. Raises `OSError`."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    sizes = {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}
    sizes.pop(SEAL_FILE, None)
    return sizes


def link_files(source: Path, target: Path) -> None:
    """Put the files of a checkpoint into another directory, without a second copy where the file system can.

    Files never change once they are written, so that sharing them is safe. Raises `OSError`.
    """
    for name in filter(is_allowed, local_sizes(source)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            (target / name).hardlink_to(source / name)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            shutil.copyfile(source / name, target / name)
