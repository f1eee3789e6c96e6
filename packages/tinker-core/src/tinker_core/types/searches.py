"""Searching sessions: what is asked and what is found."""

from __future__ import annotations

from datetime import datetime

import attrs

from tinker_core.types.records import SessionRecord


@attrs.frozen(kw_only=True)
class StatusQuery:
    """One status that a session may be in."""

    status: str
    """``active``, ``client_finished``, ``failed`` or ``cancelled``."""
    reasons: tuple[str, ...] | None = None
    """Of ``client_finished``: reasons of which one must be the session's; None is any."""


@attrs.frozen(kw_only=True)
class SessionSearch:
    """Conditions that all hold, except that session_id and display_name are alternatives when both are given."""

    session_id: str | None = None
    project_ids: tuple[str, ...] | None = None
    user_metadata: dict[str, str] = attrs.field(factory=dict)
    display_name: str | None = None
    """Words, each of which the name contains in whatever case."""
    statuses: tuple[StatusQuery, ...] | None = None
    limit: int = 50
    after: tuple[datetime, str] | None = None
    """Creation time and id of the last session of the page before."""


@attrs.frozen(kw_only=True)
class SessionSummary:
    """A session that was found."""

    session: SessionRecord
    status: str | None
    """``active`` or ``client_finished``; None when it is neither finished nor known to be running."""
    checkpoints_count: int
    checkpoint_storage_bytes: int
