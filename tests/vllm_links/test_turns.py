"""Who may use a device that holds one set of weights at a time, on random schedules and in the corner cases."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vllm_links.engines import run
from tinker_core.errors import CheckpointMismatchError, WorkerLostError
from tinker_sampler_vllm.engine.turns import WeightTurns

MISSING = 9
"""Weights that cannot be had."""


class Device:
    """What is in, who uses it, and in which order things happened."""

    def __init__(self) -> None:
        self.present = 0
        self.users: list[int] = []
        self.switches: list[int] = []
        self.fails = False
        self.may_switch = asyncio.Event()
        self.may_switch.set()
        self.turns = WeightTurns(self._switch, 0)

    async def _switch(self, key: int) -> None:
        assert not self.users
        self.present = -1
        await self.may_switch.wait()
        await asyncio.sleep(0)
        assert not self.users
        if self.fails:
            raise RuntimeError("half of it is in")
        if key == MISSING:
            self.present = self.turns.present
            raise CheckpointMismatchError("they are gone")
        self.present = key
        self.switches.append(key)

    async def use(self, key: int, steps: int = 1) -> int:
        """Hold weights for some steps of the event loop; how many switches it took."""
        before = len(self.switches)
        async with self.turns.using(key):
            waited = len(self.switches) - before
            self.users.append(key)
            try:
                for _ in range(steps):
                    assert self.present == key
                    await asyncio.sleep(0)
                assert self.present == key
            finally:
                self.users.remove(key)
        return waited


@attrs.frozen
class Visit:
    key: int
    begins: int
    steps: int
    gives_up: int | None


VISITS = st.lists(
    st.builds(
        Visit,
        key=st.sampled_from([0, 1, 2, MISSING]),
        begins=st.integers(0, 12),
        steps=st.integers(0, 6),
        gives_up=st.none() | st.integers(0, 12),
    ),
    max_size=20,
)


@settings(max_examples=300, deadline=None)
@given(VISITS)
def test_everybody_is_served_with_their_own_weights_and_nobody_waits_for_more_than_one_turn_of_each_other(visits):
    async def scenario() -> None:
        device = Device()
        kinds = len({visit.key for visit in visits})

        async def visit_device(visit: Visit) -> None:
            for _ in range(visit.begins):
                await asyncio.sleep(0)
            if visit.key == MISSING:
                with pytest.raises(CheckpointMismatchError):
                    await device.use(MISSING)
            else:
                assert await device.use(visit.key, visit.steps) <= kinds

        async def cancel(task: asyncio.Task[None], after: int) -> None:
            for _ in range(after):
                await asyncio.sleep(0)
            task.cancel()

        tasks = [asyncio.create_task(visit_device(visit)) for visit in visits]
        given_up = [visit.gives_up is not None for visit in visits]
        cancels = [
            asyncio.create_task(cancel(task, visit.gives_up))
            for task, visit in zip(tasks, visits, strict=True)
            if visit.gives_up is not None
        ]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*cancels)
        for result, may_be_cancelled in zip(results, given_up, strict=True):
            assert result is None or (may_be_cancelled and isinstance(result, asyncio.CancelledError)), result
        assert await device.use(2) <= 1

    run(scenario())


async def _until(condition) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come about")


def test_a_stream_of_users_of_the_present_weights_does_not_starve_others():
    async def scenario() -> None:
        device, ended, served = Device(), asyncio.Event(), 0

        async def stream() -> None:
            nonlocal served
            while not ended.is_set():
                await device.use(0, 3)
                served += 1

        streams = [asyncio.create_task(stream()) for _ in range(4)]
        await _until(lambda: served > 8)
        assert await device.use(1) == 1
        ended.set()
        await asyncio.gather(*streams)
        assert device.switches[:2] == [1, 0]

    run(scenario())


def test_newcomers_queue_behind_whoever_waits_and_are_then_admitted_together():
    async def scenario() -> None:
        device, order = Device(), []

        async def visit(name: str, key: int) -> None:
            async with device.turns.using(key):
                order.append(name)
                await asyncio.sleep(0)

        async with device.turns.using(0):
            tasks = []
            for name, key in (("b1", 1), ("a1", 0), ("c1", 2), ("b2", 1), ("a2", 0)):
                tasks.append(asyncio.create_task(visit(name, key)))
                await asyncio.sleep(0)
            assert order == []
        await asyncio.gather(*tasks)
        assert order == ["b1", "b2", "a1", "a2", "c1"]
        assert device.switches == [1, 0, 2]

    run(scenario())


def test_users_of_the_present_weights_go_on_when_the_one_who_wanted_others_gives_up():
    async def scenario() -> None:
        device = Device()
        async with device.turns.using(0):
            other = asyncio.create_task(device.use(1))
            await asyncio.sleep(0)
            same = asyncio.create_task(device.use(0))
            await asyncio.sleep(0)
            other.cancel()
            await same
        assert device.switches == []

    run(scenario())


def test_giving_up_in_the_middle_of_a_change_lets_it_end_and_harms_nobody():
    async def scenario() -> None:
        device = Device()
        device.may_switch.clear()
        first = asyncio.create_task(device.use(1))
        await _until(lambda: device.present == -1)
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        second = asyncio.create_task(device.use(0))
        await asyncio.sleep(0)
        device.may_switch.set()
        await second
        assert device.switches == [1, 0]

    run(scenario())


def test_weights_that_cannot_be_had_are_an_error_of_those_who_want_them_only():
    async def scenario() -> None:
        device = Device()
        visits = await asyncio.gather(
            device.use(MISSING), device.use(0), device.use(MISSING), device.use(1), return_exceptions=True
        )
        assert [type(visit) for visit in visits] == [CheckpointMismatchError, int, CheckpointMismatchError, int]
        assert device.switches == [1]

    run(scenario())


def test_a_change_that_fails_half_way_ends_all_use():
    async def scenario() -> None:
        device = Device()
        device.fails = True
        visits = await asyncio.gather(device.use(1), device.use(0), device.use(2), return_exceptions=True)
        assert isinstance(visits[0], WorkerLostError)
        assert "half of it is in" in str(visits[0])
        assert {type(visit) for visit in visits} == {WorkerLostError}
        with pytest.raises(WorkerLostError):
            await device.use(0)
        assert "half of it is in" in await device.turns.wait_failed()
        assert device.turns.failure == await device.turns.wait_failed()

    run(scenario())
