"""Results that clients come back for: kept until they were fetched and a while longer, found by request id."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.errors import UnknownRequestError
from tinker_core.types import AcceptedRequest, Caller, EngineOutput

DELIVERED_SECONDS = 900.0
"""How long a fetched result is kept, because the response that carried it may have been lost."""
UNDELIVERED_SECONDS = 24 * 3600.0
"""How long a result that nobody fetched is kept."""


@attrs.define(kw_only=True, eq=False)
class PendingResult:
    """One accepted request and, in time, its result."""

    accepted: AcceptedRequest
    caller: Caller
    key: Hashable
    accepted_at: float
    done: asyncio.Future[EngineOutput]
    delivered: bool = False
    base_model: str = ""
    """The base model that serves it; empty while, or because, none does."""

    @property
    def owner(self) -> str:
        """Whose request it is."""
        return self.caller.owner


class FutureTable:
    """All requests whose results may still be asked for, and the idempotency keys that lead to them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: dict[str, PendingResult] = {}
        self._keys: dict[Hashable, str] = {}
        self._expiry: dict[bool, OrderedDict[str, float]] = {False: OrderedDict(), True: OrderedDict()}

    def find(self, key: Hashable) -> AcceptedRequest | None:
        """The receipt of an earlier request with the same identity."""
        request_id = self._keys.get(key)
        return self._entries[request_id].accepted if request_id is not None else None

    def add(self, accepted: AcceptedRequest, caller: Caller, key: Hashable) -> PendingResult:
        """Open the future of an accepted request."""
        self._drop_expired()
        entry = PendingResult(
            accepted=accepted,
            caller=caller,
            key=key,
            accepted_at=self._clock.monotonic(),
            done=asyncio.get_running_loop().create_future(),
        )
        self._entries[accepted.request_id] = entry
        self._keys[key] = accepted.request_id
        return entry

    def resolve(self, request_id: str, output: EngineOutput) -> PendingResult | None:
        """Set a result once and wake whoever waits for it; None when it was already set."""
        entry = self._entries[request_id]
        if entry.done.done():
            return None
        entry.done.set_result(output)
        self._expiry[False][request_id] = self._clock.monotonic() + UNDELIVERED_SECONDS
        return entry

    async def wait(self, request_id: str, owner: str, timeout: float) -> EngineOutput | None:  # noqa: ASYNC109
        """The result as soon as it is there, or None when ``timeout`` seconds pass first.

        Raises `UnknownRequestError`, also for another owner's request.
        """
        entry = self._entries.get(request_id)
        if entry is None or entry.owner != owner:
            raise UnknownRequestError(request_id)
        if not entry.done.done():
            await asyncio.wait([entry.done], timeout=timeout)
        if not entry.done.done():
            return None
        self._mark_delivered(entry)
        return entry.done.result()

    def pending(self, belongs: Callable[[PendingResult], bool]) -> list[PendingResult]:
        """Unresolved entries that satisfy a condition."""
        return [entry for entry in self._entries.values() if not entry.done.done() and belongs(entry)]

    def _mark_delivered(self, entry: PendingResult) -> None:
        if entry.delivered:
            return
        entry.delivered = True
        request_id = entry.accepted.request_id
        self._expiry[False].pop(request_id, None)
        self._expiry[True][request_id] = self._clock.monotonic() + DELIVERED_SECONDS

    def _drop_expired(self) -> None:
        """Each queue holds its entries in the order in which they expire, so this looks at the expired ones only."""
        now = self._clock.monotonic()
        for queue in self._expiry.values():
            while queue and next(iter(queue.values())) <= now:
                request_id, _ = queue.popitem(last=False)
                entry = self._entries.pop(request_id)
                if self._keys.get(entry.key) == request_id:
                    del self._keys[entry.key]
