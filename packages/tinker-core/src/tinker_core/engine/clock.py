"""Time, injected so that tests own it."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Where an engine reads the time."""

    def monotonic(self) -> float:
        """Seconds that never go back; for deadlines."""

    def now(self) -> datetime:
        """The aware UTC time; for records."""

    async def wait(self, event: asyncio.Event, deadline: float | None) -> None:
        """Return when the event is set, or when `monotonic` reaches the deadline if there is one."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """Seconds of the system's monotonic clock."""
        return time.monotonic()

    def now(self) -> datetime:
        """The system's time in UTC."""
        return datetime.now(UTC)

    async def wait(self, event: asyncio.Event, deadline: float | None) -> None:
        """Sleep until the event or the deadline."""
        timeout = None if deadline is None else max(0.0, deadline - self.monotonic())
        try:
            # Not asyncio.wait_for: before Python 3.12 it forgets a cancellation that comes together with the event.
            async with asyncio.timeout(timeout):
                await event.wait()
        except TimeoutError:
            return
