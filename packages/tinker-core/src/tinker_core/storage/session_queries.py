"""Questions about sessions, and changes to all that belongs to one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import sqlalchemy as sa

from tinker_core.storage.rows import Rows
from tinker_core.storage.tables import checkpoints, samplers, sessions, training_runs
from tinker_core.types import SessionRecord

_SCAN = 500
"""Rows that are fetched at a time while searching."""


class SessionQueries(Rows):
    """Searches sessions and moves them between projects."""

    async def search(
        self,
        owner: str,
        matches: Callable[[SessionRecord], bool],
        *,
        session_id: str | None,
        project_ids: tuple[str, ...] | None,
        after: tuple[datetime, str] | None,
        limit: int,
    ) -> list[SessionRecord]:
        """At most ``limit`` sessions, newest first; ``after`` is creation time and id of the last one already known.

        ``matches`` runs on a thread of the store's.
        """
        conditions = [sessions.c.owner == owner]
        if session_id is not None:
            conditions.append(sessions.c.session_id == session_id)
        if project_ids is not None:
            conditions.append(sessions.c.project_id.in_(project_ids))
        newest_first = (sessions.c.created_at.desc(), sessions.c.session_id.desc())
        query = sa.select(sessions).where(*conditions).order_by(*newest_first).limit(_SCAN)

        def work(connection: sa.Connection) -> list[SessionRecord]:
            found: list[SessionRecord] = []
            last = after
            while True:
                rows = connection.execute(query if last is None else query.where(_beyond(last))).mappings().all()
                for row in rows:
                    record = self._record(row, SessionRecord)
                    last = (record.created_at, record.session_id)
                    if matches(record):
                        found.append(record)
                        if len(found) == limit:
                            return found
                if len(rows) < _SCAN:
                    return found

        return await self._read(work)

    async def saved(self, session_ids: list[str]) -> dict[str, tuple[int, int]]:
        """Number and bytes of the checkpoints of sessions that have any."""
        joined = checkpoints.join(training_runs, training_runs.c.model_id == checkpoints.c.run_id)
        query = (
            sa.select(training_runs.c.session_id, sa.func.count(), sa.func.sum(checkpoints.c.size_bytes))
            .select_from(joined)
            .where(training_runs.c.session_id.in_(session_ids))
            .group_by(training_runs.c.session_id)
        )
        rows = await self._read(lambda connection: list(connection.execute(query)))
        return {session_id: (int(number), int(size)) for session_id, number, size in rows}

    async def set_project(self, session_id: str, project_id: str) -> None:
        """Move a session with its training runs, their checkpoints, and its samplers."""
        runs = sa.select(training_runs.c.model_id).where(training_runs.c.session_id == session_id)
        statements = [
            sa.update(table).where(condition).values(project_id=project_id)
            for table, condition in (
                (sessions, sessions.c.session_id == session_id),
                (training_runs, training_runs.c.session_id == session_id),
                (checkpoints, checkpoints.c.run_id.in_(runs)),
                (samplers, samplers.c.session_id == session_id),
            )
        ]

        def work(connection: sa.Connection) -> None:
            for statement in statements:
                connection.execute(statement)

        await self._run(work)


def _beyond(after: tuple[datetime, str]) -> sa.ColumnElement[bool]:
    created_at, session_id = after
    place = (sa.literal(created_at, sessions.c.created_at.type), sa.literal(session_id, sessions.c.session_id.type))
    return sa.tuple_(sessions.c.created_at, sessions.c.session_id) < sa.tuple_(*place)
