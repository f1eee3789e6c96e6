"""What a client learns about a request that has no result yet, and about which results have arrived."""

from __future__ import annotations

from enum import StrEnum

import attrs

from tinker_core.types.requests import EngineOutput

__all__ = ["ACTIVE", "Completion", "CompletionPage", "QueueState", "QueueStatus", "SampleTarget"]

_CLONE_BLOCK = 1_000_000_000
"""The seq_ids of a clone of a sampling client lie in a block of this size of their own."""


class QueueState(StrEnum):
    """Whether a request can run now."""

    ACTIVE = "active"
    """It runs, or waits only for earlier work of its own model."""
    PAUSED_CAPACITY = "paused_capacity"
    """It waits for something of the server's that others use."""
    PAUSED_RATE_LIMIT = "paused_rate_limit"
    """It waits because of a limit of its API key."""


@attrs.frozen(kw_only=True)
class QueueStatus:
    """Why a request has no result yet."""

    state: QueueState = QueueState.ACTIVE
    reason: str | None = None
    """What it waits for; None when it is active."""


ACTIVE = QueueStatus()
"""Nothing holds the request up."""


@attrs.frozen(kw_only=True)
class SampleTarget:
    """One client of a sampling session: the session's first, or one of its clones in any process."""

    sampling_session_id: str
    clone_id: int = 0

    @classmethod
    def of(cls, sampling_session_id: str, seq_id: int) -> SampleTarget:
        """The client that numbers its requests like this."""
        return cls(sampling_session_id=sampling_session_id, clone_id=seq_id // _CLONE_BLOCK)

    @property
    def seq_ids(self) -> range:
        """How this client numbers its requests."""
        return range(self.clone_id * _CLONE_BLOCK, (self.clone_id + 1) * _CLONE_BLOCK)


@attrs.frozen(kw_only=True)
class Completion:
    """A sample that has its result."""

    request_id: str
    output: EngineOutput


@attrs.frozen(kw_only=True)
class CompletionPage:
    """Samples of one client that got their results since its cursor."""

    completions: tuple[Completion, ...]
    cursor: int
    """Where the next page begins; to a later process it means the beginning."""
