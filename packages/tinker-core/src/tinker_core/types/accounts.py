"""What a server keeps about those who use it: their API keys, what they used, what they did."""

from __future__ import annotations

from datetime import datetime

import attrs

from tinker_core.types.callers import KeyLimits
from tinker_core.types.enums import UsageKind
from tinker_core.types.requests import JsonObject

__all__ = ["ApiKeyRecord", "AuditRecord", "UsageRecord", "session_of_run"]


@attrs.frozen(kw_only=True)
class ApiKeyRecord:
    """An API key, as far as it is kept: its hash, never itself. All datetimes are aware and in UTC."""

    key_id: str
    key_hash: str = attrs.field(repr=False)
    """SHA-256 of the key, in hexadecimal."""
    last_four: str
    """The key's last characters, to tell keys apart."""
    name: str
    owner: str
    created_at: datetime
    limits: KeyLimits = KeyLimits()
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    project_id: str | None = None

    def refusal(self, now: datetime) -> str | None:
        """Why the key opens nothing at this time; None when it does."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return None


@attrs.frozen(kw_only=True)
class UsageRecord:
    """An amount of one kind, used between two moments by one key in one run."""

    kind: UsageKind
    owner: str
    base_model: str
    starts_at: datetime
    """Tokens and counts: the beginning of an hour. Storage: when the checkpoint was saved."""
    ends_at: datetime
    """Tokens and counts: the end of that hour. Storage: when the checkpoint was removed."""
    quantity: int
    """Tokens, checkpoints saved, or bytes stored for the whole time."""
    key_id: str | None = None
    project_id: str | None = None
    session_id: str | None = None
    run_id: str | None = None


@attrs.frozen(kw_only=True)
class AuditRecord:
    """One thing that was done to one of an owner's objects."""

    recorded_at: datetime
    category: str
    """``checkpoints``, ``projects``, ``teams`` or ``organizations``."""
    event: str
    """``<resource>_<action>``, such as ``checkpoint_saved``."""
    owner: str
    project_id: str | None = None
    details: JsonObject = attrs.field(factory=dict)


def session_of_run(run_id: str) -> str | None:
    """The session that made a training run; None for what is no run's id."""
    session_id, separator, _ = run_id.rpartition(":train:")
    return session_id if separator else None
