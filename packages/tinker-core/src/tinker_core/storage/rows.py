"""Records as rows: what the stores of the control database have in common."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from tinker_core.encoding import make_converter
from tinker_core.storage.database import Database

_T = TypeVar("_T")
_R = TypeVar("_R")


class Rows:
    """Runs SQL on the threads that all stores of one database share.

    Every method raises `StorageError` when the database itself fails, `DatabaseUnavailableError` when it cannot be
    reached, and `InvalidRequestError` for text that no database can hold.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._converter = make_converter()
        self._converter.register_structure_hook(datetime, lambda value, _: value)

    async def _run(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Do some work in one transaction that may write."""
        return await self._database.write(work)

    async def _read(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Do some work that only reads."""
        return await self._database.read(work)

    @property
    def server_id(self) -> str | None:
        """The server that looks after its own records here."""
        return self._database.server_id

    def _looked_after(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """Whether a row is this server's to look after."""
        return sa.true() if self.server_id is None else sa.or_(column.is_(None), column == self.server_id)

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
        row = await self._read(lambda connection: connection.execute(query).mappings().first())
        return None if row is None else self._record(row, cls)

    async def _ids(self, column: sa.Column[Any], condition: sa.ColumnElement[bool]) -> list[str]:
        query = sa.select(column).where(condition).order_by(column.table.c.number)
        return await self._read(lambda connection: list(connection.execute(query).scalars()))

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

        rows, total = await self._read(work)
        return [self._record(row, cls) for row in rows], total
