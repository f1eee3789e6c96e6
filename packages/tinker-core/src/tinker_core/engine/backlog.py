"""How much accepted work may wait: tokens of training, of one owner and of all, and samples.

Over a bound, training is delayed before it is accepted, and samples are turned away for a while. A request is never
delayed by what waits for it: the parts of one call are accepted before the first of them is sent, so nothing is held
back unless something goes on that makes room. An owner with less than an even share of the bound for all is not held
back by what the others have queued.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.engine.usage import Metered
from tinker_core.errors import RateLimitError

REQUEST_TOKENS = 1024
"""What a request counts at least: about the memory that one takes which has hardly any tokens."""
BUSY_RETRY_SECONDS = 1.0
"""What a sample is told to wait that found too many of them."""
RECHECK_SECONDS = 1.0
"""How soon it is noticed that nothing makes room any more, if nothing announces it."""


@attrs.frozen(kw_only=True)
class LoadBounds:
    """How much may be queued; `EngineConfig` has the same fields and says what they mean."""

    max_queued_tokens: int = 128 * 1024**2
    max_queued_tokens_per_owner: int = 32 * 1024**2
    max_queued_samples: int = 32 * 1024


@attrs.define(kw_only=True, eq=False)
class _Held:
    """A request that waits to be accepted."""

    tokens: int
    let_in: asyncio.Event = attrs.field(factory=asyncio.Event)


@attrs.define(kw_only=True, eq=False)
class _Share:
    """What one owner has queued."""

    tokens: int = 0
    samples: int = 0
    models: Counter[str] = attrs.field(factory=Counter)
    """Accepted requests without a result, by model."""
    held: deque[_Held] = attrs.field(factory=deque)

    @property
    def is_empty(self) -> bool:
        return not (self.models or self.samples or self.held)


class Backlog:
    """Counts accepted work and keeps more of it waiting outside.

    ``can_progress(model_id)`` says whether a model's accepted work runs on without anything that is still to arrive.
    """

    def __init__(self, clock: Clock, can_progress: Callable[[str], bool], bounds: LoadBounds) -> None:
        self._clock = clock
        self._can_progress = can_progress
        self._bounds = bounds
        self._shares: dict[str, _Share] = {}
        self._tokens = 0
        self._samples = 0
        self._num_training = 0
        """Owners with accepted training."""
        self._num_held = 0

    @property
    def tokens(self) -> int:
        """Tokens of accepted training without a result."""
        return self._tokens

    @property
    def num_held(self) -> int:
        """Requests that wait to be accepted."""
        return self._num_held

    # --- what is accepted ---------------------------------------------------------------------------------------------

    def begin(self, request: Metered) -> None:
        """Note an accepted request; it may exceed the bounds."""
        share = self._share(request.caller.owner)
        if request.model_id is None:
            share.samples += 1
            self._samples += 1
            return
        self._num_training += not share.models
        share.models[request.model_id] += 1
        share.tokens += _counted(request.max_tokens)
        self._tokens += _counted(request.max_tokens)

    def end(self, request: Metered) -> None:
        """Note that a request has its result."""
        share = self._share(request.caller.owner)
        if request.model_id is None:
            share.samples -= 1
            self._samples -= 1
        else:
            share.tokens -= _counted(request.max_tokens)
            self._tokens -= _counted(request.max_tokens)
            share.models[request.model_id] -= 1
            if not share.models[request.model_id]:
                del share.models[request.model_id]
                self._num_training -= not share.models
            self._let_in()
        self._drop_if_empty(request.caller.owner)

    # --- what wants to be accepted ------------------------------------------------------------------------------------

    def admit_sample(self, owner: str) -> None:
        """Let one sample pass; raises `RateLimitError`."""
        most = self._bounds.max_queued_samples
        own = self._shares[owner].samples if owner in self._shares else 0
        if self._samples >= most:
            raise RateLimitError(
                f"the server has {most} samples in progress (--max-queued-samples); wait for results",
                BUSY_RETRY_SECONDS,
            )
        if 2 * own >= most:
            raise RateLimitError(
                f"you have {own} samples in progress, half of what the server takes (--max-queued-samples); "
                "wait for results",
                BUSY_RETRY_SECONDS,
            )

    async def hold(self, owner: str, num_tokens: int, deadline: float) -> bool:
        """Delay a training request until there is room, or nothing makes any; returns whether it had to wait."""
        share = self._share(owner)
        held = _Held(tokens=_counted(num_tokens))
        try:
            if not share.held and self._fits(share, held.tokens):
                return False
            if not self._is_working(share, held.tokens):
                return False
            await self._wait_in_line(share, held, deadline)
        finally:
            self._drop_if_empty(owner)
        return True

    def recheck(self) -> None:
        """Let in what waits for nothing any more; to be called when a base model has nothing to run."""
        if self._num_held:
            for share in self._shares.values():
                for held in share.held:
                    if not self._is_working(share, held.tokens):
                        held.let_in.set()

    async def _wait_in_line(self, share: _Share, held: _Held, deadline: float) -> None:
        share.held.append(held)
        self._num_held += 1
        comes_in = False
        try:
            await self._wait(share, held, deadline)
            comes_in = True
        finally:
            share.held.remove(held)
            self._num_held -= 1
            if not comes_in:
                self._let_in()  # the next one, in place of this

    async def _wait(self, share: _Share, held: _Held, deadline: float) -> None:
        while not held.let_in.is_set():
            now = self._clock.monotonic()
            if now >= deadline or not self._is_working(share, held.tokens):
                return
            await self._clock.wait(held.let_in, min(deadline, now + RECHECK_SECONDS))

    def _let_in(self) -> None:
        """Wake the requests for which there is room, each owner's in the order in which they came."""
        if not self._num_held:
            return
        extra_of_all = 0
        for share in self._shares.values():
            extra = 0
            for held in share.held:
                if not self._fits(share, held.tokens, extra, extra_of_all):
                    break
                extra += held.tokens
                extra_of_all += held.tokens
                held.let_in.set()

    def _fits(self, share: _Share, tokens: int, extra: int = 0, extra_of_all: int = 0) -> bool:
        """Whether there is room for so many tokens, besides those that are let in already."""
        own = share.tokens + extra + tokens
        if own == tokens:
            return True  # nothing of this owner is there that could make room
        bounds = self._bounds
        if own > bounds.max_queued_tokens_per_owner:
            return False
        fits_all = self._tokens + extra_of_all + tokens <= bounds.max_queued_tokens
        return fits_all or own <= bounds.max_queued_tokens // max(1, self._num_training)

    def _is_working(self, share: _Share, tokens: int) -> bool:
        """Whether something goes on that makes room."""
        if share.tokens + tokens > self._bounds.max_queued_tokens_per_owner:
            return any(self._can_progress(model_id) for model_id in share.models)
        return any(self._can_progress(model_id) for each in self._shares.values() for model_id in each.models)

    def _share(self, owner: str) -> _Share:
        share = self._shares.get(owner)
        if share is None:
            share = self._shares[owner] = _Share()
        return share

    def _drop_if_empty(self, owner: str) -> None:
        share = self._shares.get(owner)
        if share is not None and share.is_empty:
            del self._shares[owner]


def _counted(num_tokens: int) -> int:
    return max(num_tokens, REQUEST_TOKENS)
