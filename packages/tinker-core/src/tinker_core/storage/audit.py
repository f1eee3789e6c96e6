"""The audit log in the control database."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from tinker_core.storage.rows import Rows
from tinker_core.storage.tables import audit_log
from tinker_core.types import AuditRecord


class AuditStore(Rows):
    """Keeps what was done; nothing is ever changed or removed."""

    async def add(self, records: Sequence[AuditRecord]) -> None:
        """Append to the log, all or none."""
        rows = [self._row(record) for record in records]
        await self._run(lambda connection: connection.execute(sa.insert(audit_log), rows))

    async def list(
        self, owner: str, after: datetime, before: datetime, category: str | None = None
    ) -> list[AuditRecord]:
        """An owner's entries from ``after`` until before ``before``, oldest first; of all categories without one."""
        conditions = [
            audit_log.c.owner == owner,
            audit_log.c.recorded_at >= after,
            audit_log.c.recorded_at < before,
        ]
        if category is not None:
            conditions.append(audit_log.c.category == category)
        query = sa.select(audit_log).where(*conditions).order_by(audit_log.c.recorded_at, audit_log.c.number)
        rows = await self._read(lambda connection: list(connection.execute(query).mappings()))
        return [self._record(row, AuditRecord) for row in rows]
