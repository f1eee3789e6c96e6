"""The usage ledger in the control database."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from tinker_core.storage.rows import Rows
from tinker_core.storage.tables import usage
from tinker_core.types import UsageRecord


class UsageStore(Rows):
    """Sums up what was used; one row for everything that differs in nothing but the amount."""

    async def add(self, records: Sequence[UsageRecord]) -> None:
        """Add amounts to the ledger, all or none."""
        rows = [{**self._row(record), "usage_key": _key_of(record)} for record in records]

        def work(connection: sa.Connection) -> None:
            for row in rows:
                found = usage.c.usage_key == row["usage_key"]
                more = sa.update(usage).where(found).values(quantity=usage.c.quantity + row["quantity"])
                if not connection.execute(more).rowcount:
                    connection.execute(sa.insert(usage).values(row))

        await self._run(work)

    async def list(self, after: datetime, before: datetime, owner: str | None = None) -> list[UsageRecord]:
        """Everything used between two moments, also what began earlier or ended later; everybody's without an owner."""
        conditions = [usage.c.starts_at < before, usage.c.ends_at > after]
        if owner is not None:
            conditions.append(usage.c.owner == owner)
        query = sa.select(usage).where(*conditions).order_by(usage.c.starts_at, usage.c.number)
        rows = await self._read(lambda connection: list(connection.execute(query).mappings()))
        return [self._usage(row) for row in rows]

    def _usage(self, row: sa.RowMapping) -> UsageRecord:
        values: dict[str, Any] = {name: row[name] for name in row if name not in ("number", "usage_key")}
        return self._converter.structure(values, UsageRecord)


def _key_of(record: UsageRecord) -> str:
    """Names every column but the amount, so that amounts that belong together meet in one row."""
    parts = (
        record.kind.value,
        record.owner,
        record.key_id or "",
        record.project_id or "",
        record.session_id or "",
        record.run_id or "",
        record.base_model,
        record.starts_at.isoformat(),
        record.ends_at.isoformat(),
    )
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
