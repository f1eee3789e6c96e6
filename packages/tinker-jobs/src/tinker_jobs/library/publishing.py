"""Folders and files that appear in the data directory whole or not at all, and of which the first one stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from tinker_core.storage.local_files import reported, sync
from tinker_jobs.errors import LibraryError

_HIDDEN = ".adding-"
"""Listings pass over what begins with a dot; what a killed process leaves behind may be deleted."""


@contextlib.contextmanager
def published_folder(root: Path, target: Path, what: str) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``target`` at the end of the block; ``what`` it is for errors.

    Raises `LibraryError` when there is one already, and `StorageError` for a disk that cannot take it.
    """
    _refuse_existing(target, what)
    temporary = root / f"{_HIDDEN}{uuid.uuid4().hex}"
    try:
        with reported("add", what):
            temporary.mkdir(parents=True)
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            target.parent.mkdir(exist_ok=True)
            try:
                # Refused by the system when somebody else's is there: a folder with files is never replaced.
                temporary.rename(target)
            except OSError:
                _refuse_existing(target, what)
                raise
            for path in (target.parent, root):
                sync(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well


@contextlib.contextmanager
def published_file(target: Path, what: str) -> Iterator[Path]:
    """As `published_folder`, for one file that only its owner can read."""
    _refuse_existing(target, what)
    temporary = target.with_name(f"{_HIDDEN}{uuid.uuid4().hex}")
    try:
        with reported("add", what):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            yield temporary
            sync(temporary)
            try:
                os.link(temporary, target)
            except FileExistsError:
                _refuse_existing(target, what)
                raise
            sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def copy_tree(source: Path, folder: Path) -> None:
    """All files of a folder, as they are. Raises `LibraryError` for what is no plain file, such as a link."""
    for path in sorted(source.rglob("*")):
        into = folder / path.relative_to(source)
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise LibraryError(f"{path} is a link or no plain file; only files and folders can be added")
        if path.is_dir():
            into.mkdir(parents=True, exist_ok=True)
        else:
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, into)


def _refuse_existing(target: Path, what: str) -> None:
    if target.exists():
        raise LibraryError(f"{what} exists already, and never changes; add it under another version or name")
