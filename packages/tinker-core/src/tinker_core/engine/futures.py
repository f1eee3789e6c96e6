"""Results that clients come back for: kept until they were fetched and a while longer, found by request id.

What is in flight, and what was resolved lately, is in memory; the journal has the rest, and outlives the process.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.engine.completions import CompletionLogs
from tinker_core.engine.journalling import decode_head, decode_output
from tinker_core.engine.request_ids import RequestIds
from tinker_core.engine.retention import Retention
from tinker_core.errors import ResultGoneError, UnknownRequestError
from tinker_core.executors.rank_loop import describe_error
from tinker_core.storage.journal import Journal
from tinker_core.types import (
    ACTIVE,
    AcceptedRequest,
    Caller,
    Completion,
    CompletionPage,
    EngineOutput,
    QueueStatus,
    SampleTarget,
)

DELIVERED_SECONDS = 900.0
"""How long a fetched result is kept, because the response that carried it may have been lost."""
UNDELIVERED_SECONDS = 24 * 3600.0
"""How long a result that nobody fetched is kept."""
MEMORY_BYTES = 256 * 1024**2
"""About how much memory resolved requests may take; beyond it they are read from the journal."""
MEMORY_RESULTS = 20_000
"""Most resolved requests in memory."""

Identity = tuple[str, int]
"""What makes two submissions the same request: what it is numbered in, the owner included, and its number there."""


@attrs.define(kw_only=True, eq=False)
class PendingResult:
    """One accepted request and, in time, its result."""

    accepted: AcceptedRequest
    caller: Caller
    key: Identity
    number: int
    """Its number in the journal."""
    accepted_at: float
    done: asyncio.Future[EngineOutput]
    journalled: asyncio.Future[None]
    """Done once the request is in the journal: before that nobody may be told that it was accepted."""
    seq_id: int | None = None
    """Its place in the order of its model."""
    num_tokens: int = 0
    size: int = 0
    """Bytes of its body in the journal."""
    publishes: bool = False
    """Whether it publishes weights of a live model."""
    settled: bool = False
    """Whether its result is known, though perhaps not yet durable."""
    recovered: bool = False
    """Whether it comes from an earlier process."""
    started_at: float | None = None
    """When it began to run, in the seconds of ``accepted_at``; None while it waits."""
    delivered: bool = False
    target: SampleTarget | None = None
    """Of a sample: the client that waits for it."""
    base_model: str = ""
    """The base model that serves it; empty while, or because, none does."""
    status: QueueStatus = ACTIVE
    """What holds it up, as far as the engine itself does."""

    def samples_in(self, session_id: str) -> bool:
        """Whether it is a sample of one of a session's sampling sessions."""
        return self.target is not None and self.target.sampling_session_id.startswith(f"{session_id}:sample:")

    @property
    def owner(self) -> str:
        """Whose request it is."""
        return self.caller.owner


class FutureTable:
    """All requests whose results may still be asked for, and the idempotency keys that lead to them."""

    def __init__(self, clock: Clock, ids: RequestIds, journal: Journal, max_memory: int = MEMORY_BYTES) -> None:
        self.ids = ids
        self._journal = journal
        self._retention = Retention(max_memory)
        self._clock = clock
        self._completions = CompletionLogs(clock)
        self._entries: dict[str, PendingResult] = {}
        self._keys: dict[Identity, str] = {}
        self._expiry: dict[bool, OrderedDict[str, float]] = {False: OrderedDict(), True: OrderedDict()}

    def find(self, key: Identity) -> PendingResult | None:
        """An earlier request with the same identity, if it is in memory."""
        request_id = self._keys.get(key)
        return self._entries[request_id] if request_id is not None else None

    def add(self, entry: PendingResult) -> None:
        """Open the future of a request."""
        self._drop_expired()
        self._entries[entry.accepted.request_id] = entry
        self._keys[entry.key] = entry.accepted.request_id

    def remove(self, entry: PendingResult) -> None:
        """Take back a request that was not accepted after all."""
        del self._entries[entry.accepted.request_id]
        self._forget_key(entry)

    def entry(self, request_id: str) -> PendingResult | None:
        """A request that is in memory."""
        return self._entries.get(request_id)

    def mark_started(self, request_id: str) -> PendingResult | None:
        """Note that a request begins to run now; None for one that is not in memory."""
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.started_at = self._clock.monotonic()
        return entry

    def settle(self, request_id: str) -> PendingResult | None:
        """Note that a result is known, once; None for a request that has one, which stays as it is."""
        entry = self._entries.get(request_id)
        if entry is None or entry.settled:
            return None
        entry.settled = True
        return entry

    def resolve(self, entry: PendingResult, output: EngineOutput) -> None:
        """Set the result, which is durable by now, and wake whoever waits for it."""
        request_id = entry.accepted.request_id
        if entry.done.done():
            return
        entry.done.set_result(output)
        self._expiry[False][request_id] = self._clock.monotonic() + UNDELIVERED_SECONDS
        if entry.target is not None:
            self._completions.add(entry.target, request_id)
        self._retention.add(request_id, entry.owner, output)
        for oldest in self._retention.excess(newest=request_id):
            self._evict(oldest)
        queue = self._expiry[True] or self._expiry[False]
        if len(self._expiry[True]) + len(self._expiry[False]) > MEMORY_RESULTS:
            self._evict(next(iter(queue)))

    def get(self, request_id: str, owner: str) -> PendingResult:
        """A request that is in memory, by its id.

        Raises `ResultGoneError` for one that is not, and `UnknownRequestError` for an id that was never issued to this
        owner, no matter whether it was to another.
        """
        entry = self._entries.get(request_id)
        if entry is not None and entry.owner == owner:
            return entry
        if entry is None and self.ids.number_of(request_id, owner) is not None:
            raise ResultGoneError(request_id)
        raise UnknownRequestError(request_id)

    async def wait(self, request_id: str, owner: str, timeout: float) -> EngineOutput | None:  # noqa: ASYNC109
        """The result as soon as it is there, or None when ``timeout`` seconds pass first.

        Raises `ResultGoneError` for one that is no longer kept, and `UnknownRequestError` as `get` does.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            return await self._stored(request_id, owner)
        if entry.owner != owner:
            raise UnknownRequestError(request_id)
        if not entry.done.done():
            await asyncio.wait([entry.done], timeout=timeout)
        if not entry.done.done():
            return None
        self._mark_delivered(entry)
        return entry.done.result()

    async def _stored(self, request_id: str, owner: str) -> EngineOutput:
        number = self.ids.number_of(request_id, owner)
        if number is None:
            raise UnknownRequestError(request_id)
        result = await self._journal.result(number)
        if result is None:
            raise ResultGoneError(request_id)
        self._journal.delivered(number, self._keep_until(DELIVERED_SECONDS))
        return decode_output(result)

    def keep_until(self) -> float:
        """Until when a result that comes now is kept for its client, in Unix seconds."""
        return self._keep_until(UNDELIVERED_SECONDS)

    def _keep_until(self, seconds: float) -> float:
        return self._clock.now().timestamp() + seconds

    def issued(self, cursor: int) -> bool:
        """Whether this process issued a cursor of `completions`."""
        return self._completions.issued(cursor)

    async def recall(self, target: SampleTarget, scope: str) -> None:
        """Have `completions` tell a client of all results that the journal keeps for it."""
        heads = await self._journal.answered(scope, target.seq_ids)
        kept = [decode_head(head).request_id for head in heads]
        # One that is in the journal and not yet resolved here is told of in a moment anyway.
        self._completions.recall(target, (each for each in kept if each not in self._entries or self._is_done(each)))

    def _is_done(self, request_id: str) -> bool:
        return self._entries[request_id].done.done()

    async def completions(
        self,
        target: SampleTarget,
        owner: str,
        cursor: int,
        timeout: float,  # noqa: ASYNC109
    ) -> CompletionPage:
        """The samples of one client that got their results since its cursor, as soon as there is one.

        Whoever calls this has checked that the sampling session is the caller's and the cursor 0 or `issued`.
        """
        found, cursor = await self._completions.page(target, cursor, timeout)
        completions = []
        for request_id in found:
            entry = self._entries.get(request_id)
            try:
                output = entry.done.result() if entry is not None else await self._stored(request_id, owner)
            except ResultGoneError as error:
                output = describe_error(error)  # its client waits for a word, and is told the same when it fetches
            completions.append(Completion(request_id=request_id, output=output))
        return CompletionPage(completions=tuple(completions), cursor=cursor)

    def release(self, target: SampleTarget, request_ids: Iterable[str]) -> None:
        """Drop results that their client has: it will not ask again. Ids that are not of this client are left alone."""
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is not None and entry.target == target and entry.done.done():
                self._mark_delivered(entry)
                self._evict(request_id)

    def pending(self, belongs: Callable[[PendingResult], bool]) -> list[PendingResult]:
        """Unresolved entries that satisfy a condition."""
        return [entry for entry in self._entries.values() if not entry.done.done() and belongs(entry)]

    def _mark_delivered(self, entry: PendingResult) -> None:
        if entry.delivered:
            return
        entry.delivered = True
        request_id = entry.accepted.request_id
        self._journal.delivered(entry.number, self._keep_until(DELIVERED_SECONDS))
        self._retention.mark_fetched(request_id)
        self._expiry[False].pop(request_id, None)
        self._expiry[True][request_id] = self._clock.monotonic() + DELIVERED_SECONDS
        if entry.target is not None:
            self._completions.remove(entry.target, request_id)

    def _drop_expired(self) -> None:
        """Each queue holds its entries in the order in which they expire, so this looks at the expired ones only."""
        now = self._clock.monotonic()
        for queue in self._expiry.values():
            while queue and next(iter(queue.values())) <= now:
                entry = self._evict(next(iter(queue)))
                if entry.target is not None:
                    self._completions.remove(entry.target, entry.accepted.request_id)

    def _evict(self, request_id: str) -> PendingResult:
        """Take a resolved request out of memory; the journal keeps its result until its time."""
        for queue in self._expiry.values():
            queue.pop(request_id, None)
        self._retention.remove(request_id)
        entry = self._entries.pop(request_id)
        self._forget_key(entry)
        return entry

    def _forget_key(self, entry: PendingResult) -> None:
        if self._keys.get(entry.key) == entry.accepted.request_id:
            del self._keys[entry.key]
