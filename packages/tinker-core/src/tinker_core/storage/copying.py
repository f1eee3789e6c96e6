"""Copying all control records into another, empty database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tinker_core.errors import ConfigurationError
from tinker_core.storage.addresses import parse_url, shown
from tinker_core.storage.database import look_at_database, open_database
from tinker_core.storage.tables import metadata
from tinker_core.storage.transactions import storage_error

_BATCH = 500
"""Rows that are in memory at a time."""


def copy_database(source_url: str, target_url: str) -> dict[str, int]:
    """Copy everything, or nothing; the number of records by table. Both databases are brought up to date first.

    Raises `ConfigurationError` for databases that cannot be opened, for a source that never had records and for a
    target that has some, `StorageError` when one fails, and `InvalidRequestError` for a text that cannot be copied.
    """
    _require_records(source_url)
    source = open_database(source_url)
    try:
        target = open_database(target_url)
        try:
            with source.begin() as reading, target.begin() as writing:
                _require_empty(writing)
                return {name: _copy(table, reading, writing) for name, table in metadata.tables.items()}
        finally:
            target.dispose()
    except sa.exc.SQLAlchemyError as error:
        raise storage_error(error) from error
    finally:
        source.dispose()


def _require_records(url: str) -> None:
    address = parse_url(url)
    missing = address.get_backend_name() == "sqlite" and not Path(address.database or "").is_file()
    if missing or look_at_database(url) is None:
        raise ConfigurationError(f"there are no control records in {shown(address)!r}; name the server's database")


def _require_empty(target: sa.Connection) -> None:
    for name, table in metadata.tables.items():
        if target.execute(sa.select(table.c.number).limit(1)).first() is not None:
            raise ConfigurationError(
                f"the database to copy into has records already, in table {name!r}; name a new one"
            )


def _copy(table: sa.Table, source: sa.Connection, target: sa.Connection) -> int:
    total = 0
    query = sa.select(table).order_by(table.c.number).execution_options(yield_per=_BATCH)
    with source.execute(query) as rows:
        for batch in rows.mappings().partitions(_BATCH):
            values: list[dict[str, Any]] = [dict(row) for row in batch]
            target.execute(sa.insert(table), values)
            total += len(values)
    if total and target.dialect.name == "postgresql":
        # The numbers were copied too; new records go on after them.
        sequence = sa.func.pg_get_serial_sequence(table.name, "number")
        target.execute(sa.select(sa.func.setval(sequence, sa.select(sa.func.max(table.c.number)).scalar_subquery())))
    return total
