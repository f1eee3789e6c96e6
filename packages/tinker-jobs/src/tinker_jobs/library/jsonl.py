"""Rows of a JSONL file: one JSON object a line, UTF-8; empty lines are passed over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from tinker_jobs.library.bad_rows import UnreadableRowError

MAX_LINE_BYTES = 16 * 1024 * 1024
"""Longest line: many times what any model's context holds."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONG_INTEGER = re.compile(rb"\d{19}")


def read_jsonl(stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and rows. At most one line is in memory. Raises `UnreadableRowError`."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UnreadableRowError(number, f"longer than {MAX_LINE_BYTES} bytes; is a line break missing?")
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.strip():
            yield number, _row(line, number)


def _row(line: bytes, number: int) -> dict[str, Any]:
    try:
        line.decode()
        # Strict: it refuses NaN, infinities, lone surrogates and what is nested without end.
        row = orjson.loads(line)
        if _LONG_INTEGER.search(line):
            row = json.loads(line)  # the other rounds integers of more than 64 bits
    except UnicodeDecodeError as error:
        raise UnreadableRowError(number, f"not UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise UnreadableRowError(number, f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UnreadableRowError(number, f"must be a JSON object, got {type(row).__name__}: {line[:60]!r}")
    return row
