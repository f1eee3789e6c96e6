"""What the limits of a key do, on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import attrs
import pytest

from tests.core.conftest import ManualClock
from tinker_core.engine.limits import HOLD_SECONDS, KeyLimiter
from tinker_core.engine.usage import Metered
from tinker_core.errors import KeyLimitError, RateLimitError
from tinker_core.types import LOCAL_CALLER, Caller, KeyLimits


@attrs.define
class Lab:
    clock: ManualClock = attrs.field(factory=ManualClock)
    working: set[str] = attrs.field(factory=set)
    """Models that progress by themselves."""
    limiter: KeyLimiter = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.limiter = KeyLimiter(self.clock, self.working.__contains__)

    def start(self, request_id: str, caller: Caller, tokens: int, model_id: str | None = None) -> None:
        metered = Metered(caller=caller, base_model="tiny", max_tokens=tokens, model_id=model_id)
        self.limiter.begin(request_id, metered)

    async def held(self, caller: Caller, tokens: int = 0) -> asyncio.Task[bool]:
        """A training request that has come as far as it can for now."""
        task = asyncio.create_task(self.limiter.hold(caller, tokens))
        await settle()
        return task


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def caller(key_id: str = "key-1", **limits: float) -> Caller:
    return Caller(owner="ann", key_id=key_id, limits=KeyLimits(**limits))  # type: ignore[arg-type]


def run(body: Callable[[Lab], Awaitable[None]]) -> None:
    async def main() -> None:
        await body(Lab())

    asyncio.run(main())


def test_without_limits_nothing_waits() -> None:
    async def body(lab: Lab) -> None:
        for someone in (LOCAL_CALLER, caller()):
            lab.start("big", someone, 10**9)
            assert not await lab.limiter.hold(someone, 10**9)
            lab.limiter.admit(someone)
            lab.limiter.admit_sample(someone, 10**9)
            lab.limiter.claim_model(someone, "m", 10**6, ())
            assert lab.limiter.end("big") is not None
            assert lab.limiter.end("big") is None

    run(body)


def test_requests_over_the_rate_are_told_how_long_to_wait() -> None:
    async def body(lab: Lab) -> None:
        limited = caller(max_requests_per_second=2.0)
        lab.limiter.admit(limited)
        lab.limiter.admit(limited)
        with pytest.raises(RateLimitError, match="2 requests per second") as caught:
            lab.limiter.admit(limited)
        assert caught.value.retry_after == 0.5
        lab.limiter.admit(caller("key-2", max_requests_per_second=2.0))  # a neighbour notices nothing
        await lab.clock.advance(0.5)
        lab.limiter.admit_sample(limited, 1)
        with pytest.raises(RateLimitError):
            lab.limiter.admit_sample(limited, 1)

    run(body)


def test_training_over_the_rate_waits_for_its_turn() -> None:
    async def body(lab: Lab) -> None:
        limited = caller(max_requests_per_second=1.0)
        assert not await lab.limiter.hold(limited, 0)
        first, second = await lab.held(limited), await lab.held(limited)
        await lab.clock.advance(1.0)
        await settle()
        assert [task.done() for task in (first, second)] == [True, False]
        await lab.clock.advance(1.0)
        assert await asyncio.gather(first, second) == [True, True]

    run(body)


def test_no_training_request_waits_longer_than_clients_do() -> None:
    async def body(lab: Lab) -> None:
        limited = caller(max_requests_per_second=0.01)
        held = [await lab.held(limited) for _ in range(4)]
        await lab.clock.advance(HOLD_SECONDS)
        await settle()
        assert all(task.done() for task in held)

    run(body)


def test_samples_over_the_tokens_in_flight_come_back_later() -> None:
    async def body(lab: Lab) -> None:
        limited = caller(max_tokens_in_flight=100)
        lab.limiter.admit_sample(limited, 60)
        lab.start("a", limited, 60)
        with pytest.raises(RateLimitError, match="100 tokens in flight"):
            lab.limiter.admit_sample(limited, 60)
        lab.limiter.admit_sample(caller("key-2", max_tokens_in_flight=100), 60)
        lab.limiter.end("a")
        lab.limiter.admit_sample(limited, 60)
        with pytest.raises(KeyLimitError, match=r"101 tokens.*100 in flight"):
            lab.limiter.admit_sample(limited, 101)

    run(body)


def test_training_over_the_tokens_in_flight_waits_until_results_make_room() -> None:
    async def body(lab: Lab) -> None:
        limited = caller(max_tokens_in_flight=100)
        lab.working.add("m")
        lab.start("a", limited, 60, "m")
        lab.start("b", limited, 30, "m")
        assert not await lab.limiter.hold(limited, 10)
        waiting = await lab.held(limited, 60)
        lab.limiter.end("b")
        await settle()
        assert not waiting.done()
        lab.limiter.end("a")
        assert await waiting
        lab.start("c", limited, 1000, "m")
        forever = await lab.held(limited, 60)
        await lab.clock.advance(HOLD_SECONDS)
        assert await forever, "after the bound it is accepted all the same"

    run(body)


def test_the_parts_of_one_call_never_wait_for_each_other() -> None:
    """Parts 2, 3, … are acknowledged before part 1 is sent: they rest in a queue that nothing but part 1 moves."""

    async def body(lab: Lab) -> None:
        limited = caller(max_tokens_in_flight=100)
        for part in (2, 3, 4, 1):
            assert not await lab.limiter.hold(limited, 80)
            lab.start(str(part), limited, 80, "m")
        lab.working.add("m")  # part 1 is there
        other = await lab.held(limited, 80)
        assert not other.done()
        for part in (1, 2, 3, 4):
            lab.limiter.end(str(part))
        assert await other

    run(body)


def test_a_held_request_goes_on_when_what_it_waited_for_turns_out_to_wait_for_it() -> None:
    async def body(lab: Lab) -> None:
        limited = caller(max_tokens_in_flight=100)
        lab.start("blocked", limited, 80, "a")
        lab.working.add("b")
        lab.start("works", limited, 80, "b")
        first_part = await lab.held(limited, 80)
        assert not first_part.done()
        lab.limiter.end("works")
        assert await first_part

    run(body)


def test_models_and_ranks_are_bounded_and_ended_models_make_room() -> None:
    async def body(lab: Lab) -> None:
        limited = caller(max_models=2, max_rank=8)
        with pytest.raises(KeyLimitError, match="rank 16 is above 8"):
            lab.limiter.claim_model(limited, "a", 16, ())
        with pytest.raises(KeyLimitError, match="rank 0 means all parameters"):
            lab.limiter.claim_model(limited, "a", 0, ())
        lab.limiter.claim_model(limited, "a", 8, ())
        lab.limiter.claim_model(limited, "b", 8, {"a"})
        lab.limiter.claim_model(caller("key-2", max_models=1), "c", 8, {"a", "b"})
        with pytest.raises(KeyLimitError, match="2 models at a time"):
            lab.limiter.claim_model(limited, "d", 8, {"a", "b", "c"})
        lab.limiter.claim_model(limited, "d", 8, {"b", "c"})

    run(body)
