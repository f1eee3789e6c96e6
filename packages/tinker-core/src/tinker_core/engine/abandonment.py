"""Clients that are gone without a word: what is done when nothing was heard of one for some time.

A sign of life is a heartbeat or any request.  After a first, short silence the samples that have not begun are dropped;
after a long one the session ends, so that its models leave memory.  What was accepted for a model always runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tinker_core.engine.clock import Clock
from tinker_core.engine.registry import Registry
from tinker_core.errors import TinkerError

log = logging.getLogger(__name__)


class Silence:
    """Does something about each session, once for every time that nothing was heard of its client for ``seconds``."""

    def __init__(
        self, registry: Registry, clock: Clock, seconds: float, *, act: Callable[[str, str], Awaitable[None]]
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._seconds = seconds
        self._act = act
        """(session id, what happened)."""
        self._handled: dict[str, float] = {}
        """When the clients of the sessions that were acted upon had been heard of last."""

    async def run(self) -> None:
        """Watch, for ever. A session that is heard of while this sleeps is looked at again later."""
        never = asyncio.Event()
        while True:
            due, look_at = self._look(self._clock.monotonic())
            if not due:
                await self._clock.wait(never, look_at)
            for session_id in due:
                detail = f"nothing was heard of its client for {self._seconds:.0f} seconds"
                log.info("session %s: %s", session_id, detail)
                try:
                    await self._act(session_id, detail)
                except TinkerError as error:
                    log.error("session %s: %s, but it could not be dealt with: %s", session_id, detail, error)

    def _look(self, now: float) -> tuple[list[str], float]:
        """The sessions to act upon now, and when to look again."""
        due, handled, look_at = [], {}, now + self._seconds
        for session_id, heard_at in self._registry.silences():
            if heard_at + self._seconds > now:
                look_at = heard_at + self._seconds
                break
            if self._handled.get(session_id) != heard_at:
                due.append(session_id)
            handled[session_id] = heard_at
        self._handled = handled
        return due, look_at
