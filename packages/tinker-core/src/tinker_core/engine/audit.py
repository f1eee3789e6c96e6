"""The audit log: who did what to which object."""

from __future__ import annotations

from datetime import datetime
from typing import Self

from tinker_core.engine.clock import Clock
from tinker_core.engine.write_behind import WriteBehind
from tinker_core.storage.audit import AuditStore
from tinker_core.types import AuditRecord, JsonObject

CATEGORIES = ("checkpoints", "projects", "teams", "organizations")
"""What an entry can be about, as clients ask for it."""

_CATEGORY_OF = {"checkpoint": "checkpoints", "project": "projects", "team": "teams"}


def audit_record(
    event: str,
    at: datetime,
    *,
    owner: str,
    project_id: str | None = None,
    key_id: str | None = None,
    details: JsonObject | None = None,
) -> AuditRecord:
    """An entry; the first word of ``event``, ``<resource>_<action>``, decides its category."""
    who: JsonObject = {} if key_id is None else {"key_id": key_id}
    return AuditRecord(
        recorded_at=at,
        category=_CATEGORY_OF.get(event.partition("_")[0], "organizations"),
        event=event,
        owner=owner,
        project_id=project_id,
        details={**who, **(details or {})},
    )


class AuditLog:
    """Records events in memory and writes them at once, but behind the backs of those who record them."""

    def __init__(self, store: AuditStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._waiting: list[AuditRecord] = []
        self._writer = WriteBehind(self._write, clock, delay=0.0)

    async def __aenter__(self) -> Self:
        await self._writer.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._writer.__aexit__(*error)

    def record(
        self,
        event: str,
        *,
        owner: str,
        project_id: str | None = None,
        key_id: str | None = None,
        details: JsonObject | None = None,
    ) -> None:
        """Note that something was done; ``owner`` is whose log it appears in. Never waits."""
        entry = audit_record(
            event, self._clock.now(), owner=owner, project_id=project_id, key_id=key_id, details=details
        )
        self._waiting.append(entry)
        self._writer.announce()

    async def entries(
        self, owner: str, after: datetime, before: datetime, category: str | None = None
    ) -> list[AuditRecord]:
        """What happened to an owner's objects in a time, oldest first."""
        await self._writer.flush()
        return await self._store.list(owner, after, before, category)

    async def _write(self) -> None:
        taken, self._waiting = self._waiting, []
        if not taken:
            return
        try:
            await self._store.add(taken)
        except BaseException:
            self._waiting[:0] = taken
            raise
