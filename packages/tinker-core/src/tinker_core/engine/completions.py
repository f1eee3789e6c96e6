"""Which samples have their results: one log per sampling client, read by a single long poll instead of one per sample.

A log holds the completions that its client has not been told of for certain, so its size is bounded by the results that
are kept anyway: an entry leaves when a later cursor acknowledges it, when the result is fetched, and when it expires.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.types import SampleTarget

PAGE_SIZE = 1000
"""Most completions of one answer; the next poll gets the rest at once."""


@attrs.define(kw_only=True, eq=False)
class _Log:
    completions: OrderedDict[str, int] = attrs.field(factory=OrderedDict)
    """Cursor by request id, in order."""
    polls: set[asyncio.Future[None]] = attrs.field(factory=set)


class CompletionLogs:
    """The logs of all sampling clients.

    A cursor is a moment: microseconds of this process, counted from a secret number.  So it says nothing about other
    clients, stays valid when an empty log is dropped, and one of an earlier process is recognised: whoever comes with
    it, or with 0, begins anew, with what is still kept of the earlier process's results.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._logs: dict[SampleTarget, _Log] = {}
        self._start = secrets.randbits(52)
        self._born = clock.monotonic()
        self._last = self._start

    def add(self, target: SampleTarget, request_id: str) -> None:
        """A sample got its result: wake whoever polls for it."""
        log = self._logs.setdefault(target, _Log())
        log.completions[request_id] = self._tick()
        for poll in log.polls:
            if not poll.done():
                poll.set_result(None)

    def issued(self, cursor: int) -> bool:
        """Whether this process issued a cursor."""
        return self._start <= cursor <= self._last

    def recall(self, target: SampleTarget, request_ids: Iterable[str]) -> None:
        """Samples got their results in the past, perhaps in an earlier process."""
        known = self._logs[target].completions if target in self._logs else {}
        for request_id in [request_id for request_id in request_ids if request_id not in known]:
            self.add(target, request_id)

    def remove(self, target: SampleTarget, request_id: str) -> None:
        """The result was fetched, or is no longer kept."""
        log = self._logs.get(target)
        if log is not None:
            log.completions.pop(request_id, None)
            self._drop_if_idle(target, log)

    async def page(self, target: SampleTarget, cursor: int, timeout: float) -> tuple[list[str], int]:  # noqa: ASYNC109
        """Request ids completed after ``cursor``, oldest first, and the next cursor; waits until there is one.

        Cursor 0 is the beginning, and never waits; any other is one that was `issued`.
        """
        log = self._logs.setdefault(target, _Log())
        while log.completions and next(iter(log.completions.values())) <= cursor:
            log.completions.popitem(last=False)
        if cursor != 0 and timeout > 0 and not log.completions:
            await self._wait(log, timeout)
        found = list(islice(log.completions.items(), PAGE_SIZE))
        self._drop_if_idle(target, log)
        return [request_id for request_id, _ in found], found[-1][1] if found else cursor or self._tick()

    async def _wait(self, log: _Log, timeout: float) -> None:  # noqa: ASYNC109
        poll = asyncio.get_running_loop().create_future()
        log.polls.add(poll)
        try:
            await asyncio.wait([poll], timeout=timeout)
        finally:
            log.polls.discard(poll)

    def _drop_if_idle(self, target: SampleTarget, log: _Log) -> None:
        if not log.completions and not log.polls and self._logs.get(target) is log:
            del self._logs[target]

    def _tick(self) -> int:
        elapsed = int((self._clock.monotonic() - self._born) * 1e6)
        self._last = max(self._last + 1, self._start + elapsed)
        return self._last
