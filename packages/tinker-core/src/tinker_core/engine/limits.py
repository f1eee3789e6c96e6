"""What the limits of an API key, and the bounds of the whole server, do to requests.

Requests over a limit that lifts by itself are delayed (training, which must keep its order) or turned away for a while
(everything else). What waiting cannot help is an error that names the limit. Polls and heartbeats never come here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import attrs

from tinker_core.engine.backlog import BUSY_RETRY_SECONDS, Backlog, LoadBounds
from tinker_core.engine.clock import Clock
from tinker_core.engine.usage import Metered
from tinker_core.errors import KeyLimitError, RateLimitError
from tinker_core.types import Caller, KeyLimits

HOLD_SECONDS = 40.0
"""How long a training request is delayed at most; clients give up reading after 45."""


@attrs.define(kw_only=True)
class _Bucket:
    """One second's requests, refilled as time passes; below zero they are reserved for the future."""

    level: float
    filled_at: float

    def fill(self, rate: float, now: float) -> None:
        self.level = min(max(1.0, rate), self.level + rate * (now - self.filled_at))
        self.filled_at = now


@attrs.define(kw_only=True)
class _KeyState:
    """What one key is using now."""

    in_flight: dict[str, Metered] = attrs.field(factory=dict)
    tokens: int = 0
    waiting: set[asyncio.Event] = attrs.field(factory=set)
    """Held requests, to be woken when tokens become free."""
    bucket: _Bucket | None = None
    models: set[str] = attrs.field(factory=set)


class KeyLimiter:
    """Counts what every key and every owner has in flight, and holds or refuses what is too much.

    ``can_progress(model_id)`` says whether a model's accepted work runs on without anything that is still to arrive.
    """

    def __init__(self, clock: Clock, can_progress: Callable[[str], bool], bounds: LoadBounds | None = None) -> None:
        self.backlog = Backlog(clock, can_progress, bounds or LoadBounds())
        """What all keys have queued."""
        self._clock = clock
        self._can_progress = can_progress
        self._keys: dict[str, _KeyState] = {}
        self._requests: dict[str, Metered] = {}
        self._never = asyncio.Event()

    # --- requests in flight -------------------------------------------------------------------------------------------

    def begin(self, request_id: str, request: Metered) -> None:
        """Note an accepted request."""
        self._requests[request_id] = request
        self.backlog.begin(request)
        if request.caller.key_id is not None:
            state = self._state(request.caller.key_id)
            state.in_flight[request_id] = request
            state.tokens += request.max_tokens

    def end(self, request_id: str) -> Metered | None:
        """Note that a request has its result; returns what was noted when it began, once."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.backlog.end(request)
        if request is not None and request.caller.key_id is not None:
            state = self._state(request.caller.key_id)
            del state.in_flight[request_id]
            state.tokens -= request.max_tokens
            for event in state.waiting:
                event.set()
        return request

    def limits_of(self, request_id: str) -> KeyLimits:
        """The limits of the key that sent a request which has no result yet; none at all for any other id."""
        request = self._requests.get(request_id)
        return request.caller.limits if request is not None else KeyLimits()

    # --- admission ----------------------------------------------------------------------------------------------------

    def admit(self, caller: Caller) -> None:
        """Let one request pass that can be sent again later; raises `RateLimitError`."""
        rate = caller.limits.max_requests_per_second
        if rate is None or caller.key_id is None:
            return
        bucket = self._bucket(caller.key_id, rate)
        if bucket.level < 1.0:
            wait = (1.0 - bucket.level) / rate
            raise RateLimitError(f"this API key may send {rate:g} requests per second; wait {wait:.1f} s", wait)
        bucket.level -= 1.0

    def admit_sample(self, caller: Caller, num_tokens: int) -> None:
        """Let one sample pass; raises `RateLimitError`, or `KeyLimitError` when it alone is too large."""
        limit = caller.limits.max_tokens_in_flight
        if limit is not None and caller.key_id is not None:
            if num_tokens > limit:
                raise KeyLimitError(
                    f"the sample may come to {num_tokens} tokens, and this API key may have {limit} in flight; "
                    "lower max_tokens, or num_samples, or shorten the prompt"
                )
            if self._state(caller.key_id).tokens + num_tokens > limit:
                raise RateLimitError(
                    f"this API key may have {limit} tokens in flight; wait for earlier results", BUSY_RETRY_SECONDS
                )
        self.backlog.admit_sample(caller.owner)
        self.admit(caller)

    async def hold(self, caller: Caller, num_tokens: int) -> bool:
        """Delay a training request until there is room, `HOLD_SECONDS` at most; returns whether it had to wait.

        The parts of one call are accepted before the first of them is sent, so room is waited for only while something
        of the key, or of the owner, is being worked on: what waits for this very request cannot make room for it.
        """
        deadline = self._clock.monotonic() + HOLD_SECONDS
        by_key = caller.key_id is not None and await self._hold_for_key(caller, caller.key_id, num_tokens, deadline)
        return await self.backlog.hold(caller.owner, num_tokens, deadline) or by_key

    async def _hold_for_key(self, caller: Caller, key_id: str, num_tokens: int, deadline: float) -> bool:
        by_rate = await self._hold_for_rate(key_id, caller.limits.max_requests_per_second)
        by_tokens = await self._hold_for_tokens(key_id, caller.limits.max_tokens_in_flight, num_tokens, deadline)
        return by_rate or by_tokens

    async def _hold_for_rate(self, key_id: str, rate: float | None) -> bool:
        if rate is None:
            return False
        bucket = self._bucket(key_id, rate)
        bucket.level = max(bucket.level - 1.0, -rate * HOLD_SECONDS)
        if bucket.level >= 0:
            return False
        await self._clock.wait(self._never, self._clock.monotonic() - bucket.level / rate)
        return True

    async def _hold_for_tokens(self, key_id: str, limit: int | None, num_tokens: int, deadline: float) -> bool:
        if limit is None or num_tokens == 0:
            return False
        state = self._state(key_id)
        held = False
        while state.tokens + num_tokens > limit and self._is_working(state) and self._clock.monotonic() < deadline:
            held = True
            event = asyncio.Event()
            state.waiting.add(event)
            try:
                await self._clock.wait(event, deadline)
            finally:
                state.waiting.discard(event)
        return held

    def _is_working(self, state: _KeyState) -> bool:
        return any(
            request.max_tokens > 0 and (request.model_id is None or self._can_progress(request.model_id))
            for request in state.in_flight.values()
        )

    # --- models -------------------------------------------------------------------------------------------------------

    def claim_model(self, caller: Caller, model_id: str, rank: int, alive: Collection[str]) -> None:
        """Note a model that a key is about to make; raises `KeyLimitError` for one too many, or of too high a rank."""
        limits = caller.limits
        if limits.max_rank is not None and rank > limits.max_rank:
            raise KeyLimitError(f"rank {rank} is above {limits.max_rank}, the highest LoRA rank of this API key")
        if limits.max_rank is not None and rank == 0:
            raise KeyLimitError(
                f"rank 0 means all parameters, and this API key may train LoRA up to rank {limits.max_rank} only"
            )
        if caller.key_id is None:
            return
        state = self._state(caller.key_id)
        state.models.intersection_update(alive)
        if limits.max_models is not None and len(state.models) >= limits.max_models:
            raise KeyLimitError(
                f"this API key may have {limits.max_models} models at a time, and has them; "
                "finish a session with models that are no longer needed"
            )
        state.models.add(model_id)

    def _state(self, key_id: str) -> _KeyState:
        return self._keys.setdefault(key_id, _KeyState())

    def _bucket(self, key_id: str, rate: float) -> _Bucket:
        state = self._state(key_id)
        now = self._clock.monotonic()
        if state.bucket is None:
            state.bucket = _Bucket(level=max(1.0, rate), filled_at=now)
        state.bucket.fill(rate, now)
        return state.bucket
