"""A tar archive of some files, written as it is read: nothing is held but one piece."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

PIECE = 1024 * 1024
_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK


def archive_size(sizes: Mapping[str, int], mtime: int) -> int:
    """Bytes of the whole archive."""
    return _END + sum(len(_header(name, size, mtime)) + _padded(size) for name, size in sizes.items())


def archive_pieces(directory: Path, sizes: Mapping[str, int], mtime: int) -> Iterator[bytes]:
    """The archive of files below a directory. ``mtime`` is in seconds since 1970. Blocking.

    All files are open before the first piece, so that removing them meanwhile does no harm. Raises `OSError`.
    """
    with ExitStack() as stack:
        files = [(name, size, stack.enter_context((directory / name).open("rb"))) for name, size in sizes.items()]
        for name, size, file in files:
            yield _header(name, size, mtime)
            remaining = size
            while remaining:
                piece = file.read(min(PIECE, remaining))
                if not piece:
                    raise OSError(f"{name} is shorter than it was")
                remaining -= len(piece)
                yield piece
            yield bytes(_padded(size) - size)
        yield bytes(_END)


def _header(name: str, size: int, mtime: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = size
    entry.mtime = mtime
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
