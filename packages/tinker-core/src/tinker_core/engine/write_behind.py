"""Writing to the database behind the backs of requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tinker_core.engine.clock import Clock
from tinker_core.errors import StorageError

log = logging.getLogger(__name__)


class WriteBehind:
    """Writes what gathers in memory: soon after it was announced, one write at a time, and once more at the end.

    ``write`` takes what has gathered and puts it back when it fails. An async context manager.
    """

    def __init__(self, write: Callable[[], Awaitable[None]], clock: Clock, *, delay: float) -> None:
        self._write = write
        self._clock = clock
        self._delay = delay
        """Seconds between the first announcement and the write, in which more may gather."""
        self._announced = asyncio.Event()
        self._never = asyncio.Event()
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> WriteBehind:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self.flush()
        except StorageError as error:
            log.error("what gathered last is lost: %s", error)

    def announce(self) -> None:
        """Note that there is something to write."""
        self._announced.set()

    async def flush(self) -> None:
        """Return when everything announced so far is written; raises `StorageError`."""
        async with self._lock:
            self._announced.clear()
            await self._write()

    async def _run(self) -> None:
        while True:
            await self._announced.wait()
            await self._clock.wait(self._never, self._clock.monotonic() + self._delay)
            try:
                await asyncio.shield(asyncio.create_task(self.flush()))
            except StorageError as error:
                log.error("not written yet, will be tried again with what comes next: %s", error)
