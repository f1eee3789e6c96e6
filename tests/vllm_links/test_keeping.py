"""The place of one engine: what is lost is started again, and is given weights once."""

from __future__ import annotations

import asyncio

import pytest

from tests.vllm_links.engines import run
from tests.vllm_links.places import Place, until
from tinker_core.errors import CheckpointMismatchError, ConfigurationError, WorkerLostError
from tinker_sampler_vllm.protocol import LoadCall
from tinker_sampler_vllm.restarts import LOCAL_PAUSES, STABLE_SECONDS, Restarts

CALL = LoadCall(revision="r1", directory="/nowhere")


def test_a_lost_engine_is_tidied_up_and_another_one_takes_its_place():
    async def scenario():
        place = Place("place")
        await place.keeper.start()
        first = place.link
        await place.lose()
        assert first.closed
        assert place.keeper.link is place.link is not first
        assert place.keeper.num_losses == 1
        await place.keeper.close()
        assert place.link.closed
        assert place.num_starts == 2

    run(scenario())


def test_the_reason_why_the_first_engine_does_not_start_is_raised():
    def refuse(link):
        raise ConfigurationError("no such model")

    async def scenario():
        place = Place("place", refuse)
        with pytest.raises(ConfigurationError, match="no such model"):
            await place.keeper.start()
        await place.keeper.close()
        assert place.num_starts == 1

    run(scenario())


@pytest.mark.parametrize("error", [WorkerLostError("it ended"), RuntimeError("a defect")])
def test_a_later_engine_that_does_not_start_is_tried_until_it_does(error):
    async def scenario():
        failures = [error] * 3

        def fail_at_first(link):
            if place.num_starts > 1 and failures:
                raise failures.pop()

        place = Place("place", fail_at_first)
        await place.keeper.start()
        await place.lose()
        assert place.num_starts == 5
        await place.keeper.close()

    run(scenario())


def test_an_engine_that_cannot_be_tidied_up_is_replaced_all_the_same():
    async def scenario():
        place = Place("place")
        await place.keeper.start()

        async def fail():
            raise RuntimeError("a defect")

        place.link.close = fail
        await place.lose()
        await place.keeper.close()

    run(scenario())


def test_pauses_grow_with_failures_in_a_row_and_a_long_life_makes_up_for_them():
    restarts = Restarts()
    assert [restarts.pause(0.0) for _ in range(7)] == [*LOCAL_PAUSES, LOCAL_PAUSES[-1]]
    assert restarts.pause(STABLE_SECONDS) == 0.0
    assert restarts.pause(1.0) == LOCAL_PAUSES[1]


def test_many_who_need_weights_at_once_have_them_loaded_once():
    async def scenario():
        place = Place("place")
        await place.keeper.start()
        link = place.link
        link.may_load.clear()
        asked = [asyncio.create_task(place.keeper.ensure(link, CALL)) for _ in range(5)]
        asked[0].cancel()  # others wait for what it began
        asyncio.get_running_loop().call_soon(link.may_load.set)
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [result for result in results if result is not None] == [results[0]]
        assert link.loads == ["r1"]
        assert place.keeper.has(link, "r1")
        await place.keeper.ensure(link, CALL)
        assert link.loads == ["r1"]
        await place.keeper.close()

    run(scenario())


def test_a_refusal_reaches_all_who_wait_and_the_next_one_asks_again():
    async def scenario():
        place = Place("place", lambda link: setattr(link, "refusal", CheckpointMismatchError("bad")))
        await place.keeper.start()
        link = place.link
        results = await asyncio.gather(*(place.keeper.ensure(link, CALL) for _ in range(3)), return_exceptions=True)
        assert [str(result) for result in results] == ["bad"] * 3
        assert not place.keeper.has(link, "r1")
        link.refusal = None
        await place.keeper.ensure(link, CALL)
        assert link.loads == ["r1", "r1"]
        await place.keeper.close()

    run(scenario())


def test_what_an_engine_held_is_not_taken_for_what_the_next_one_holds():
    async def scenario():
        place = Place("place")
        await place.keeper.start()
        first = place.link
        await place.keeper.ensure(first, CALL)
        await place.lose()
        assert not place.keeper.has(first, "r1")
        assert not place.keeper.has(place.link, "r1")
        with pytest.raises(WorkerLostError):
            await place.keeper.ensure(first, CALL)
        await place.keeper.ensure(place.link, CALL)
        assert place.link.weights == ["r1"]
        await place.keeper.close()

    run(scenario())


def test_weights_that_are_retired_while_they_are_loaded_do_not_stay():
    async def scenario():
        place = Place("place")
        await place.keeper.start()
        link = place.link
        link.may_load.clear()
        loading = asyncio.create_task(place.keeper.ensure(link, CALL))
        await until(lambda: link.loads)
        retiring = asyncio.create_task(place.keeper.retire("r1"))
        await asyncio.sleep(0)
        assert not retiring.done()
        link.may_load.set()
        await asyncio.gather(loading, retiring)
        assert link.weights == []
        assert not place.keeper.has(link, "r1")
        await place.keeper.close()

    run(scenario())


def test_weights_that_an_engine_takes_with_it_need_no_retiring():
    async def scenario():
        place = Place("place")
        await place.keeper.start()
        link = place.link
        link.may_load.clear()
        loading = asyncio.create_task(place.keeper.ensure(link, CALL))
        await until(lambda: link.loads)
        retiring = asyncio.create_task(place.keeper.retire("r1"))
        await asyncio.sleep(0)
        link.lose()
        await retiring
        with pytest.raises(WorkerLostError):
            await loading
        await place.keeper.retire("unknown")
        await place.keeper.close()

    run(scenario())
