"""Sessions as their owners look them up and arrange them."""

from __future__ import annotations

import json

from tinker_core.engine.audit import AuditLog
from tinker_core.engine.clock import Clock
from tinker_core.engine.copies import check_project_id
from tinker_core.engine.registry import Registry
from tinker_core.types import Caller, SessionRecord, SessionSearch, SessionSummary, StatusQuery


class Catalogue:
    """Searches sessions and puts them into projects."""

    def __init__(self, registry: Registry, audit: AuditLog, clock: Clock) -> None:
        self._clock = clock
        self._registry = registry
        self._audit = audit

    async def search(self, owner: str, wanted: SessionSearch) -> tuple[list[SessionSummary], bool]:
        """A page of an owner's sessions, newest first, and whether there are more."""
        active = self._registry.active_sessions(self._clock.monotonic())
        queries = self._registry.control.session_queries
        found = await queries.search(
            owner,
            lambda session: _matches(session, wanted, active),
            session_id=wanted.session_id if wanted.display_name is None else None,
            project_ids=wanted.project_ids,
            after=wanted.after,
            limit=wanted.limit + 1,
        )
        page, more = found[: wanted.limit], len(found) > wanted.limit
        saved = await queries.saved([session.session_id for session in page])
        summaries = []
        for session in page:
            number, size = saved.get(session.session_id, (0, 0))
            summaries.append(
                SessionSummary(
                    session=session,
                    status=_status(session, active),
                    checkpoints_count=number,
                    checkpoint_storage_bytes=size,
                )
            )
        return summaries, more

    async def assign_project(self, session_id: str, project_id: str, caller: Caller) -> None:
        """Move a session into a project, with its runs, their checkpoints, and its samplers."""
        check_project_id(project_id)
        session = await self._registry.session(session_id, caller.owner)
        await self._registry.control.session_queries.set_project(session_id, project_id)
        self._registry.set_project(session_id, project_id)
        self._audit.record(
            "project_assigned",
            owner=session.owner,
            project_id=project_id,
            key_id=caller.key_id,
            details={"session_id": session_id, "previous_project_id": session.project_id},
        )


def _status(session: SessionRecord, active: frozenset[str]) -> str | None:
    if session.finished_at is not None:
        return "client_finished"
    return "active" if session.session_id in active else None


def _matches(session: SessionRecord, wanted: SessionSearch, active: frozenset[str]) -> bool:
    if wanted.display_name is not None:
        name = (session.display_name or "").casefold()
        named = all(word in name for word in wanted.display_name.casefold().split())
        if not named and session.session_id != wanted.session_id:
            return False
    metadata = session.user_metadata or {}
    for key, value in wanted.user_metadata.items():
        if key not in metadata or _text(metadata[key]) != value:
            return False
    return wanted.statuses is None or any(_has_status(session, query, active) for query in wanted.statuses)


def _has_status(session: SessionRecord, query: StatusQuery, active: frozenset[str]) -> bool:
    if _status(session, active) != query.status:
        return False
    return query.reasons is None or session.finish_reason in query.reasons


def _text(value: object) -> str:
    """Metadata as listings show it."""
    return value if isinstance(value, str) else json.dumps(value)
