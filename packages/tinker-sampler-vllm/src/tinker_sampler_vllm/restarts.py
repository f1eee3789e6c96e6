"""How an engine that was lost is started, or connected to, again, and how long is waited before."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from tinker_core.errors import TinkerError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

STABLE_SECONDS = 60.0
"""An engine that ran for so long makes up for all failures before it."""
LOCAL_PAUSES = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds; a start takes long itself, and one that fails again and again must not take all of a machine."""
REMOTE_PAUSES = (0.0, 1.0, 2.0)
"""Seconds; to ask again costs nothing, and a machine that is back should not be waited for."""


class Restarts:
    """Starts what was lost at one place again, and counts failures in a row there."""

    def __init__(self, pauses: Sequence[float] = LOCAL_PAUSES) -> None:
        self._pauses = pauses
        self._failures = 0

    def pause(self, lived: float) -> float:
        """Seconds to wait after an engine that ran for ``lived`` seconds, 0.0 if it did not start."""
        self._failures = 1 if lived >= STABLE_SECONDS else self._failures + 1
        return self._pauses[min(self._failures, len(self._pauses)) - 1]

    async def start_again(self, name: str, start: Callable[[], Awaitable[_T]], lived: float) -> _T:
        """What ``start`` returns when it succeeds, after a `pause` before each try."""
        while True:
            await asyncio.sleep(self.pause(lived))
            try:
                return await start()
            except Exception as error:
                if not isinstance(error, TinkerError):
                    log.exception("%s failed", name)
                log.error("%s does not start: %s", name, error)
                lived = 0.0
