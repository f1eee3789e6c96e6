"""Who sends a request, and what they may use."""

from __future__ import annotations

import attrs

from tinker_core.types.records import LOCAL_OWNER

__all__ = ["LOCAL_CALLER", "Caller", "KeyLimits"]


@attrs.frozen(kw_only=True)
class KeyLimits:
    """What one API key may use; None is no limit."""

    max_models: int | None = None
    """Models alive at once."""
    max_rank: int | None = None
    """LoRA rank of a model."""
    max_tokens_in_flight: int | None = None
    """Tokens of accepted requests without a result."""
    max_stored_bytes: int | None = None
    """Bytes of saved checkpoints."""
    max_requests_per_second: float | None = None
    """Submissions and listings; polls, heartbeats and telemetry never count."""


@attrs.frozen(kw_only=True)
class Caller:
    """The sender of a request."""

    owner: str = LOCAL_OWNER
    """Whom everything that the request makes belongs to; several keys may share one owner."""
    key_id: str | None = None
    """The API key that it came with; None on a server without keys."""
    limits: KeyLimits = KeyLimits()


LOCAL_CALLER = Caller()
"""The one caller of a server without API keys."""
