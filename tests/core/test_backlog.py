"""What may be queued, by one owner and by all, on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import attrs
import pytest

from tests.core.conftest import ManualClock
from tests.core.test_key_limits import settle
from tinker_core.engine.backlog import REQUEST_TOKENS, LoadBounds
from tinker_core.engine.limits import HOLD_SECONDS, KeyLimiter
from tinker_core.engine.usage import Metered
from tinker_core.errors import RateLimitError
from tinker_core.types import Caller

K = REQUEST_TOKENS


@attrs.define
class Lab:
    clock: ManualClock = attrs.field(factory=ManualClock)
    stuck: set[str] = attrs.field(factory=set)
    """Models that wait for something that is still to arrive."""
    limiter: KeyLimiter = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        bounds = LoadBounds(max_queued_tokens=20 * K, max_queued_tokens_per_owner=8 * K, max_queued_samples=6)
        self.limiter = KeyLimiter(self.clock, lambda model_id: model_id not in self.stuck, bounds)

    def start(self, request_id: str, owner: str, tokens: int, model_id: str | None = "m") -> None:
        metered = Metered(caller=Caller(owner=owner), base_model="tiny", max_tokens=tokens, model_id=model_id)
        self.limiter.begin(request_id, metered)

    async def held(self, owner: str, tokens: int) -> asyncio.Task[bool]:
        task = asyncio.create_task(self.limiter.hold(Caller(owner=owner), tokens))
        await settle()
        return task


def run(body: Callable[[Lab], Awaitable[None]]) -> None:
    async def main() -> None:
        lab = Lab()
        await body(lab)
        assert lab.limiter.backlog.num_held == 0

    asyncio.run(main())


def test_an_owner_at_the_bound_waits_for_its_own_results_and_nobody_else_waits_for_it() -> None:
    async def body(lab: Lab) -> None:
        lab.start("1", "ann", 5 * K)
        lab.start("2", "ann", 3 * K)
        first, second = await lab.held("ann", 3 * K), await lab.held("ann", K)
        assert not await lab.limiter.hold(Caller(owner="ben"), 8 * K)
        assert not first.done()
        lab.limiter.end("2")
        await settle()
        assert await first
        assert not second.done(), "the first comes first, and takes the room"
        lab.start("3", "ann", 3 * K)
        lab.limiter.end("1")
        assert await second

    run(body)


def test_all_together_are_bounded_and_whoever_has_less_than_an_even_share_is_let_in() -> None:
    async def body(lab: Lab) -> None:
        for owner in ("ann", "ben"):
            lab.start(owner, owner, 8 * K, owner)
        lab.start("cid", "cid", 4 * K, "cid")
        assert not await lab.limiter.hold(Caller(owner="cid"), K), "a third of 20 is more than 5"
        waiting = await lab.held("cid", 3 * K)
        assert not waiting.done()
        assert not await lab.limiter.hold(Caller(owner="dan"), 5 * K), "who has nothing there"
        lab.limiter.end("ann")
        assert await waiting

    run(body)


def test_requests_without_tokens_count_as_well() -> None:
    async def body(lab: Lab) -> None:
        for number in range(8):
            assert not await lab.limiter.hold(Caller(owner="ann"), 0)
            lab.start(str(number), "ann", 0)
        waiting = await lab.held("ann", 0)
        assert not waiting.done()
        assert lab.limiter.backlog.tokens == 8 * K
        lab.limiter.end("0")
        assert await waiting

    run(body)


def test_nothing_waits_for_what_waits_for_it() -> None:
    """Parts 2, 3, … of a call rest in the queue until part 1 comes; and then until a model gets stuck, unannounced."""

    async def body(lab: Lab) -> None:
        lab.stuck.add("m")
        for part in ("2", "3", "4"):
            assert not await lab.limiter.hold(Caller(owner="ann"), 5 * K)
            lab.start(part, "ann", 5 * K)
        assert not await lab.limiter.hold(Caller(owner="ann"), 5 * K), "part 1"
        lab.stuck.clear()
        waiting = await lab.held("ann", K)
        assert not waiting.done()
        lab.stuck.add("m")
        await lab.clock.advance(1.0)
        assert await waiting

    run(body)


def test_no_request_waits_longer_than_clients_do_and_one_that_goes_away_frees_its_place() -> None:
    async def body(lab: Lab) -> None:
        lab.start("1", "ann", 100 * K)
        first, second = await lab.held("ann", K), await lab.held("ann", K)
        first.cancel()
        await settle()
        await lab.clock.advance(HOLD_SECONDS - 1)
        await settle()
        assert not second.done()
        await lab.clock.advance(1.0)
        assert await second
        lab.limiter.end("1")
        assert not await lab.limiter.hold(Caller(owner="ann"), 100 * K), "too large for ever, so it comes alone"

    run(body)


def test_samples_over_the_bound_come_back_later() -> None:
    async def body(lab: Lab) -> None:
        limiter = lab.limiter
        for number in range(3):
            limiter.admit_sample(Caller(owner="ann"), 10**9)
            lab.start(f"ann{number}", "ann", 10**9, None)
        with pytest.raises(RateLimitError, match="half of what the server takes") as caught:
            limiter.admit_sample(Caller(owner="ann"), 1)
        assert caught.value.retry_after == 1.0
        for number in range(3):
            limiter.admit_sample(Caller(owner="ben"), 1)
            lab.start(f"ben{number}", "ben", 1, None)
        with pytest.raises(RateLimitError, match="the server has 6 samples"):
            limiter.admit_sample(Caller(owner="cid"), 1)
        limiter.end("ann0")
        limiter.admit_sample(Caller(owner="cid"), 1)
        assert not await limiter.hold(Caller(owner="ann"), 8 * K), "samples are no training"

    run(body)
