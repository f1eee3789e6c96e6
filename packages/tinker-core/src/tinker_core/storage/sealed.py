"""Directories of files with a seal: a name and a checksum of every file, so that damage is found before it is used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

from tinker_core.errors import DamagedRecordError, StorageError
from tinker_core.storage.local_files import reported, sync

SEAL_FILE = "seal.json"
"""What is sealed, and the SHA-256 of every file beside it."""


def make_directory(directory: Path) -> None:
    """A new empty directory to be sealed later. Raises `StorageError`."""
    with reported("write", directory):
        directory.mkdir(parents=True)


def make_durable_directory(directory: Path) -> None:
    """A directory that is still there after a power cut, if it was not there before. Raises `StorageError`."""
    with reported("write", directory):
        missing = [each for each in (directory, *directory.parents) if not each.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        for each in reversed(missing):
            sync(each.parent)


def seal(directory: Path, name: str) -> int:
    """Checksum all files of a directory and flush them to disk; returns their size in bytes. Raises `StorageError`."""
    with reported("write", directory):
        files = _files(directory)
        sums = {file: _checksum(directory / file) for file in files}
        (directory / SEAL_FILE).write_text(json.dumps({"name": name, "sha256": sums}))
        for file in (*files, SEAL_FILE):
            sync(directory / file)
        sync(directory)
        return sum((directory / file).stat().st_size for file in files)


def put_in_place(directory: Path, target: Path) -> None:
    """Give a sealed directory its final name at once and durably; what was there goes. Raises `StorageError`."""
    with reported("write", target):
        if target.exists():
            shutil.rmtree(target)
        directory.rename(target)
        sync(target.parent)


def sealed_name(directory: Path) -> str:
    """What a directory was sealed as; raises `DamagedRecordError`."""
    return _read(directory)[0]


def size_on_disk(directory: Path) -> int:
    """Bytes of the files of a sealed directory. Raises `StorageError`."""
    with reported("read", directory):
        return sum((directory / file).stat().st_size for file in _files(directory))


def verify(directory: Path) -> None:
    """Raise `DamagedRecordError`, naming the file, unless all files are as they were when they were sealed."""
    _, sums = _read(directory)
    with reported("read", directory):
        found = _files(directory)
        for file in sorted(sums.keys() | set(found)):
            if file not in found:
                raise DamagedRecordError(f"{directory / file} is missing; restore it from a backup")
            if _checksum(directory / file) != sums.get(file):
                raise DamagedRecordError(
                    f"{directory / file} is damaged: its checksum does not fit; restore it from a backup"
                )


def remove(directory: Path) -> None:
    """Remove a directory if it is there. Raises `StorageError`."""
    with reported("remove", directory), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)


def _read(directory: Path) -> tuple[str, dict[str, str]]:
    path = directory / SEAL_FILE
    try:
        content = json.loads(path.read_text())
        return str(content["name"]), {str(file): str(value) for file, value in content["sha256"].items()}
    except FileNotFoundError as error:
        raise DamagedRecordError(f"{path} is missing; restore the data directory from a backup") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRecordError(f"{path} is damaged: {error}; restore the data directory from a backup") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _files(directory: Path) -> list[str]:
    """Names of the files below a directory, without the seal."""
    names = (file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    return sorted(name for name in names if name != SEAL_FILE)


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
