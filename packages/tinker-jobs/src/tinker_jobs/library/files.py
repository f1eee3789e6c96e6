"""What a file is: its size and its SHA-256."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import BinaryIO

from tinker_jobs.errors import LibraryError
from tinker_jobs.refs import FrozenFile

_CHUNK_BYTES = 1024 * 1024


def digest(stream: BinaryIO) -> tuple[int, str]:
    """Bytes from here to the end, and their SHA-256 in hex. Takes one chunk of memory."""
    found, size = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK_BYTES):
        found.update(chunk)
        size += len(chunk)
    return size, found.hexdigest()


class FileHashes:
    """Hashes of files, each computed once for as long as the file stays as it is. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], FrozenFile]] = {}
        self._lock = threading.Lock()

    def freeze(self, path: Path, name: str) -> FrozenFile:
        """The file as it is now; ``name`` is its own in errors. Raises `LibraryError`."""
        try:
            if not path.is_file():
                raise LibraryError(f"{name} is missing or no file")
            status = path.stat()
            signature = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            with self._lock:
                known = self._known.get(path)
            if known is not None and known[0] == signature:
                return known[1]
            with path.open("rb") as stream:
                size, sha256 = digest(stream)
        except OSError as error:
            raise LibraryError(f"{name} cannot be read: {error.strerror}") from error
        frozen = FrozenFile(path=str(path), size_bytes=size, sha256=sha256)
        with self._lock:
            self._known[path] = (signature, frozen)
        return frozen
