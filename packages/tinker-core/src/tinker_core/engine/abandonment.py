"""Sessions whose clients are gone without a word: ended after a long silence, so that their models leave memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tinker_core.engine.clock import Clock
from tinker_core.engine.registry import Registry
from tinker_core.errors import TinkerError

log = logging.getLogger(__name__)


class Abandonment:
    """Ends each session when nothing was heard of its client for ``seconds``: no heartbeat and no request."""

    def __init__(
        self, registry: Registry, clock: Clock, seconds: float, *, end: Callable[[str, str], Awaitable[None]]
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._seconds = seconds
        self._end = end
        """(session id, detail) -> the session is finished and its work stopped."""

    async def run(self) -> None:
        """Watch, for ever. A session that is heard of while this sleeps is looked at again later."""
        never = asyncio.Event()
        while True:
            now = self._clock.monotonic()
            silent = self._registry.longest_silent()
            if silent is None:
                await self._clock.wait(never, now + self._seconds)
                continue
            session_id, heard_at = silent
            if heard_at + self._seconds > now:
                await self._clock.wait(never, heard_at + self._seconds)
                continue
            log.info("session %s: nothing heard for %d seconds, it ends", session_id, self._seconds)
            self._registry.give_up(session_id)
            try:
                await self._end(session_id, f"nothing was heard of its client for {self._seconds:.0f} seconds")
            except TinkerError as error:
                log.error("session %s could not be ended: %s", session_id, error)
