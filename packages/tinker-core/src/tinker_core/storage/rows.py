"""Records as rows: what the stores of the control database have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from tinker_core.encoding import make_converter
from tinker_core.errors import StorageError

_T = TypeVar("_T")
_R = TypeVar("_R")


class Rows:
    """Runs SQL, one transaction at a time, on a thread that all stores of one database share.

    Every method raises `StorageError` when the database itself fails.
    """

    def __init__(self, engine: sa.Engine, thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._thread = thread
        self._converter = make_converter()
        self._converter.register_structure_hook(datetime, lambda value, _: value)

    async def _run(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Do some work in one transaction on the store's thread."""

        def transaction() -> _T:
            try:
                with self._engine.begin() as connection:
                    return work(connection)
            except sa.exc.SQLAlchemyError as error:
                # The driver's own words only: the statement and its values are for the log, not for the caller.
                reason = str(error.orig) if isinstance(error, sa.exc.StatementError) else type(error).__name__
                raise StorageError(
                    f"the control database failed: {reason}; check free space and permissions of the data directory"
                ) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)

    def _row(self, record: object) -> dict[str, Any]:
        row: dict[str, Any] = self._converter.unstructure(record)
        return row

    def _record(self, row: sa.RowMapping, cls: type[_R]) -> _R:
        values = {name: value for name, value in row.items() if name not in ("number", "run_id", "num_clones")}
        return self._converter.structure(values, cls)

    async def _insert(self, table: sa.Table, record: object) -> None:
        row = self._row(record)
        await self._run(lambda connection: connection.execute(sa.insert(table).values(row)))

    async def _change(self, statement: sa.Update | sa.Delete, missing: Exception) -> None:
        if not await self._run(lambda connection: connection.execute(statement).rowcount):
            raise missing

    async def _get(self, column: sa.Column[Any], value: str, cls: type[_R]) -> _R | None:
        query = sa.select(column.table).where(column == value)
        row = await self._run(lambda connection: connection.execute(query).mappings().first())
        return None if row is None else self._record(row, cls)

    async def _ids(self, column: sa.Column[Any], condition: sa.ColumnElement[bool]) -> list[str]:
        query = sa.select(column).where(condition).order_by(column.table.c.number)
        return await self._run(lambda connection: list(connection.execute(query).scalars()))

    async def _list(
        self,
        table: sa.Table,
        cls: type[_R],
        conditions: list[sa.ColumnElement[bool]],
        limit: int | None,
        offset: int,
    ) -> tuple[list[_R], int]:
        count = sa.select(sa.func.count()).select_from(table).where(*conditions)
        newest_first = (table.c.created_at.desc(), table.c.number.desc())
        page = sa.select(table).where(*conditions).order_by(*newest_first).limit(limit).offset(offset)

        def work(connection: sa.Connection) -> tuple[list[sa.RowMapping], int]:
            return list(connection.execute(page).mappings()), connection.execute(count).scalar_one()

        rows, total = await self._run(work)
        return [self._record(row, cls) for row in rows], total
