"""Rows of a Parquet file, with the values that JSON has: what was left out of a nested record is not in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, BinaryIO

from tinker_jobs.library.bad_rows import UnreadableRowError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

MAGIC = b"PAR1"
"""First bytes of the format."""
_BATCH_ROWS = 64
_BUFFER_BYTES = 1024 * 1024


def read_parquet(stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers from 1 and rows. A few rows are in memory at once. Raises `UnreadableRowError`."""
    import pyarrow as pa  # here, because few jobs need what takes so long to load
    import pyarrow.parquet as pq

    number = 0
    try:
        # Unbuffered, a whole row group would be read at once.
        with pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                for index in range(batch.num_rows):
                    number += 1
                    yield number, _row(batch.slice(index, 1), number)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableRowError(None, f"not a whole Parquet file: {error} (after row {number})") from error


def _row(batch: RecordBatch, number: int) -> dict[str, Any]:
    try:
        (row,) = batch.to_pylist()
        return {name: _value(value) for name, value in row.items()}
    except UnicodeDecodeError as error:
        raise UnreadableRowError(number, f"not UTF-8: {error.reason}") from error
    except (ValueError, OverflowError) as error:
        raise UnreadableRowError(number, str(error)) from error


def _value(value: object) -> object:
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case list() if value and all(isinstance(item, tuple) for item in value):  # a map
            return {str(key): _value(item) for key, item in value}
        case list():
            return [_value(item) for item in value]
        case dict():
            # All records of a column have all its fields, those that a record never had as nulls.
            return {name: _value(item) for name, item in value.items() if item is not None}
        case date() | time():
            return value.isoformat()
        case Decimal() if value.is_finite():
            return str(value)
    raise ValueError(f"{value!r:.60} has no form in JSON; leave its column out")
