"""A look at SQLite's write-ahead log before SQLite takes it.

SQLite uses a log up to its first invalid frame and drops the rest without a word. That is right for what a power cut
left of the last transaction, and wrong for a byte that flipped in the middle: what was durable would vanish, and the
frames before it could even overwrite newer pages of the database. The two differ: a transaction is written only after
the one before it is durable, so intact *later commits* behind an invalid frame mean damage.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

_HEADER = struct.Struct(">8I")
_FRAME_HEADER = 24
_MAGIC = 0x377F0682
"""The lowest bit says whether the words of checksums are big-endian."""
_FRAMES_AT_ONCE = 2048

_Words = npt.NDArray[np.uint32]


def wal_damage(path: Path) -> str | None:
    """What in the write-ahead log of a database that nobody has open cannot be the work of a power cut."""
    try:
        raw = np.memmap(path, np.uint8, mode="r") if path.stat().st_size >= _HEADER.size else None
    except FileNotFoundError:
        return None
    if raw is None or not raw[: _HEADER.size].any():
        return None
    magic, _, page_size, _, *_ = header = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    order = ">" if magic & 1 else "<"
    start = np.zeros(2, np.uint32)
    check = _chain(start, _sums(raw[:24].view(f"{order}u4").astype(np.uint32)[None]), 3)
    if magic | 1 != _MAGIC | 1 or tuple(int(part) for part in check[0]) != header[6:]:
        return "its header is damaged, so that nothing in it can be read"
    frames = _frames(raw[_HEADER.size :], page_size)
    intact, commits = _examine(frames, np.array(header[4:6]), np.array(header[6:], np.uint32), order)
    return _lost(intact, commits, page_size)


def _lost(intact: npt.NDArray[np.bool_], commits: npt.NDArray[np.bool_], page_size: int) -> str | None:
    if intact.all():
        return None
    bad = int(np.argmin(intact))
    later = np.flatnonzero(commits[bad:] & intact[bad:]) + bad
    own_end = bad if commits[bad] else (int(later[0]) if later.size else len(intact))
    lost = int((later > own_end).sum())
    if not lost:
        return None
    offset = _HEADER.size + bad * (_FRAME_HEADER + page_size)
    return f"frame {bad + 1} at byte {offset} is damaged, and {lost} or more transactions follow it"


def _frames(raw: npt.NDArray[np.uint8], page_size: int) -> npt.NDArray[np.uint8]:
    size = _FRAME_HEADER + page_size
    count = len(raw) // size
    return raw[: count * size].reshape(count, size)


def _examine(
    frames: npt.NDArray[np.uint8], salts: npt.NDArray[np.int64], first: _Words, order: str
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """By frame: whether its checksum follows from the one stored before it, and whether it ends a transaction."""
    intact = np.zeros(len(frames), np.bool_)
    commits = np.zeros(len(frames), np.bool_)
    before = first
    for start in range(0, len(frames), _FRAMES_AT_ONCE):
        part = np.ascontiguousarray(frames[start : start + _FRAMES_AT_ONCE])
        heads = part[:, :_FRAME_HEADER].copy().view(">u4").astype(np.uint32)
        stored = heads[:, 4:6]
        words = np.concatenate([part[:, :8], part[:, _FRAME_HEADER:]], axis=1).view(f"{order}u4").astype(np.uint32)
        expected = _chain(np.concatenate([before[None], stored[:-1]]), _sums(words), words.shape[1] // 2)
        known = (heads[:, 2:4] == salts).all(axis=1) & (heads[:, 0] > 0)
        intact[start : start + len(part)] = known & (expected == stored).all(axis=1)
        commits[start : start + len(part)] = known & (heads[:, 1] > 0)
        before = stored[-1]
    return intact, commits


def _sums(words: _Words) -> _Words:
    """What the words of each row add to SQLite's pair of sums, which starts at zero; shape (rows, 2).

    Each pair of words ``x, y`` turns the sums ``s, t`` into ``s + t + x`` and ``s + 2 t + x + y``, modulo 2**32. So a
    word counts by the power of that matrix that comes after it.
    """
    pairs = words.shape[1] // 2
    weights = _powers(pairs)[pairs - 1 :: -1] if pairs > 1 else _powers(pairs)[:1]
    x, y = words[:, 0::2], words[:, 1::2]
    columns = [
        x @ (weights[:, row, 0] + weights[:, row, 1]).astype(np.uint32) + y @ weights[:, row, 1].copy()
        for row in (0, 1)
    ]
    return np.stack(columns, axis=1)


def _chain(starts: _Words, sums: _Words, pairs: int) -> _Words:
    """The sums of rows that start from the given sums."""
    step = _powers(pairs)[pairs]
    ends: _Words = np.atleast_2d(starts) @ step.T + sums
    return ends


def _powers(count: int) -> _Words:
    """The powers 0 to ``count`` of the matrix; shape (count + 1, 2, 2)."""
    powers = np.empty((count + 1, 2, 2), np.uint32)
    s = np.eye(2, dtype=np.uint32)
    step = np.array([[1, 1], [1, 2]], np.uint32)
    for index in range(count + 1):
        powers[index] = s
        s = step @ s
    return powers
