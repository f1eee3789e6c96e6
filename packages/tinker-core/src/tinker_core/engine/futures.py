"""Results that clients come back for: kept until they were fetched and a while longer, found by request id."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.engine.completions import CompletionLogs
from tinker_core.engine.request_ids import RequestIds
from tinker_core.engine.retention import Retention
from tinker_core.errors import ResultGoneError, UnknownRequestError
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
MAX_RESULT_BYTES = 4 * 1024**3
"""About how much memory kept results may take; beyond it the owner who keeps most loses the oldest ones."""


@attrs.define(kw_only=True, eq=False)
class PendingResult:
    """One accepted request and, in time, its result."""

    accepted: AcceptedRequest
    caller: Caller
    key: Hashable
    accepted_at: float
    done: asyncio.Future[EngineOutput]
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

    def __init__(self, clock: Clock, ids: RequestIds, max_result_bytes: int = MAX_RESULT_BYTES) -> None:
        self.ids = ids
        self._retention = Retention(max_result_bytes)
        self._clock = clock
        self._completions = CompletionLogs(clock)
        self._entries: dict[str, PendingResult] = {}
        self._keys: dict[Hashable, str] = {}
        self._expiry: dict[bool, OrderedDict[str, float]] = {False: OrderedDict(), True: OrderedDict()}

    def find(self, key: Hashable) -> AcceptedRequest | None:
        """The receipt of an earlier request with the same identity."""
        request_id = self._keys.get(key)
        return self._entries[request_id].accepted if request_id is not None else None

    def add(
        self, accepted: AcceptedRequest, caller: Caller, key: Hashable, target: SampleTarget | None = None
    ) -> PendingResult:
        """Open the future of an accepted request."""
        self._drop_expired()
        entry = PendingResult(
            accepted=accepted,
            caller=caller,
            key=key,
            accepted_at=self._clock.monotonic(),
            done=asyncio.get_running_loop().create_future(),
            target=target,
        )
        self._entries[accepted.request_id] = entry
        self._keys[key] = accepted.request_id
        return entry

    def mark_started(self, request_id: str) -> None:
        """Note that a request begins to run now."""
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.started_at = self._clock.monotonic()

    def resolve(self, request_id: str, output: EngineOutput) -> PendingResult | None:
        """Set a result once and wake whoever waits for it; None when it was already set."""
        entry = self._entries.get(request_id)
        if entry is None or entry.done.done():
            return None
        entry.done.set_result(output)
        self._expiry[False][request_id] = self._clock.monotonic() + UNDELIVERED_SECONDS
        if entry.target is not None:
            self._completions.add(entry.target, request_id)
        self._retention.add(request_id, entry.owner, output)
        for oldest in self._retention.excess(newest=request_id):
            self._forget(oldest)
        return entry

    def get(self, request_id: str, owner: str) -> PendingResult:
        """A request by its id.

        Raises `ResultGoneError` for one whose result is no longer kept, and `UnknownRequestError` for an id that was
        never issued to this owner, no matter whether it was to another.
        """
        entry = self._entries.get(request_id)
        if entry is not None and entry.owner == owner:
            return entry
        if entry is None and self.ids.was_issued_to(request_id, owner):
            raise ResultGoneError(request_id)
        raise UnknownRequestError(request_id)

    async def wait(self, request_id: str, owner: str, timeout: float) -> EngineOutput | None:  # noqa: ASYNC109
        """The result as soon as it is there, or None when ``timeout`` seconds pass first.

        Raises what `get` raises.
        """
        entry = self.get(request_id, owner)
        if not entry.done.done():
            await asyncio.wait([entry.done], timeout=timeout)
        if not entry.done.done():
            return None
        self._mark_delivered(entry)
        return entry.done.result()

    async def completions(
        self,
        target: SampleTarget,
        cursor: int,
        timeout: float,  # noqa: ASYNC109
    ) -> CompletionPage:
        """The samples of one client that got their results since its cursor, as soon as there is one.

        Whoever calls this has checked that the sampling session is the caller's. Raises `StaleCursorError`.
        """
        found, cursor = await self._completions.page(target, cursor, timeout)
        entries = [(request_id, self._entries.get(request_id)) for request_id in found]
        return CompletionPage(
            completions=tuple(
                Completion(request_id=request_id, output=entry.done.result())
                for request_id, entry in entries
                if entry is not None
            ),
            cursor=cursor,
        )

    def release(self, target: SampleTarget, request_ids: Iterable[str]) -> None:
        """Drop results that their client has: it will not ask again. Ids that are not of this client are left alone."""
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is not None and entry.target == target and entry.done.done():
                self._forget(request_id)

    def pending(self, belongs: Callable[[PendingResult], bool]) -> list[PendingResult]:
        """Unresolved entries that satisfy a condition."""
        return [entry for entry in self._entries.values() if not entry.done.done() and belongs(entry)]

    def _mark_delivered(self, entry: PendingResult) -> None:
        if entry.delivered:
            return
        entry.delivered = True
        request_id = entry.accepted.request_id
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
                self._drop(queue.popitem(last=False)[0])

    def _forget(self, request_id: str) -> None:
        """Drop a result before its time."""
        for queue in self._expiry.values():
            queue.pop(request_id, None)
        self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        self._retention.remove(request_id)
        entry = self._entries.pop(request_id)
        if self._keys.get(entry.key) == request_id:
            del self._keys[entry.key]
        if entry.target is not None:
            self._completions.remove(entry.target, request_id)
