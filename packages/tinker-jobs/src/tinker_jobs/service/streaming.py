"""A job's log as server-sent events: ``log`` for a line, and at last ``status`` with the job once it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import attrs
import orjson

from tinker_core.engine.clock import Clock
from tinker_jobs.errors import JobRequestError, Mistake
from tinker_jobs.records import JobRecord, LogRecord
from tinker_jobs.service.answers import describe_job, describe_line
from tinker_jobs.service.tenancy import Tenancy

EVENT_STREAM = "text/event-stream"
KEEP_ALIVE_SECONDS = 15.0
"""After so long without an event comes a comment, before proxies take the connection for dead."""
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""So that no proxy keeps events back."""
_LAST_EVENT = "last-event-id"


@attrs.frozen(kw_only=True)
class Following:
    """Whoever reads a stream, and what it waits by."""

    clock: Clock
    tenancy: Tenancy
    until_stopping: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]

    async def events(self, news: AsyncIterator[LogRecord | JobRecord]) -> AsyncGenerator[bytes, None]:
        """The bytes to send. A server that stops ends them early; clients come back with ``Last-Event-ID``."""
        while True:
            awaited = asyncio.ensure_future(anext(news, None))
            try:
                while not awaited.done():
                    if await self.until_stopping(self._rest(awaited)) is None:
                        return
                    if not awaited.done():
                        yield KEEP_ALIVE
            finally:
                awaited.cancel()
            item = awaited.result()
            if item is None:
                return
            yield self._encode(item)

    async def _rest(self, awaited: asyncio.Future[Any]) -> bool:
        arrived = asyncio.Event()
        awaited.add_done_callback(lambda _: arrived.set())
        await self.clock.wait(arrived, self.clock.monotonic() + KEEP_ALIVE_SECONDS)
        return True

    def _encode(self, item: LogRecord | JobRecord) -> bytes:
        if isinstance(item, JobRecord):
            return b"event: status\ndata: %s\n\n" % orjson.dumps(describe_job(item, self.tenancy))
        return b"id: %d\nevent: log\ndata: %s\n\n" % (item.number, orjson.dumps(describe_line(item)))


def last_event(headers: Any, after: int) -> int:  # noqa: ANN401 - Starlette's Headers
    """Where to go on: after the last event that the client had, which a browser sends again by itself."""
    text = headers.get(_LAST_EVENT)
    if text is None:
        return after
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        message = "Last-Event-ID must be the id of an event of this stream"
        raise JobRequestError([Mistake(loc=("header", _LAST_EVENT), msg=message)])
    return int(text)
