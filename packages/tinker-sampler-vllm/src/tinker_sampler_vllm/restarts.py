"""How long to wait before an engine that was lost is started, or connected to, again."""

from __future__ import annotations

from collections.abc import Sequence

STABLE_SECONDS = 60.0
"""An engine that ran for so long makes up for all failures before it."""
LOCAL_PAUSES = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds; a start takes long itself, and one that fails again and again must not take all of a machine."""
REMOTE_PAUSES = (0.0, 1.0, 2.0)
"""Seconds; to ask again costs nothing, and a machine that is back should not be waited for."""


class Restarts:
    """Counts failures in a row at one place."""

    def __init__(self, pauses: Sequence[float] = LOCAL_PAUSES) -> None:
        self._pauses = pauses
        self._failures = 0

    def pause(self, lived: float) -> float:
        """Seconds to wait after an engine that ran for ``lived`` seconds, 0.0 if it did not start."""
        self._failures = 1 if lived >= STABLE_SECONDS else self._failures + 1
        return self._pauses[min(self._failures, len(self._pauses)) - 1]
