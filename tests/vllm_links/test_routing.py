"""Which engine runs a sample."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.vllm_links.engines import make_sample, run
from tests.vllm_links.places import Place, until
from tinker_core.errors import ConfigurationError, UnsupportedFeatureError
from tinker_sampler_vllm.routing import Router


@asynccontextmanager
async def places(number, **fields):
    made = [Place(f"place {index}", **fields) for index in range(number)]
    for place in made:
        await place.keeper.start()
    try:
        yield made
    finally:
        for place in made:
            place.may_start.set()
            await place.keeper.close()


async def place_of(stack, router, session, **fields):
    """The name of the place that a sample runs at until the stack ends."""
    keeper, _ = await stack.enter_async_context(router.place(session, make_sample(session=session, **fields)))
    return keeper.name


def test_a_session_stays_with_its_engine_while_that_has_room():
    async def scenario():
        async with places(3) as made, AsyncExitStack() as stack:
            router = Router([place.keeper for place in made])
            homes = [await place_of(stack, router, "a") for _ in range(20)]
            assert len(set(homes)) == 1

    run(scenario())


def test_a_new_session_goes_to_the_engine_with_the_fewest_sequences():
    async def scenario():
        async with places(3) as made, AsyncExitStack() as stack:
            router = Router([place.keeper for place in made])
            assert await place_of(stack, router, "a", num_samples=4) == "place 0"
            assert await place_of(stack, router, "b") == "place 1"
            assert await place_of(stack, router, "c", num_samples=2) == "place 2"
            assert await place_of(stack, router, "d") == "place 1"
            await stack.aclose()
            assert [place.keeper.num_sequences for place in made] == [0, 0, 0]
            assert await place_of(stack, router, "e") == "place 0"

    run(scenario())


def test_samples_that_would_wait_at_home_run_elsewhere_and_the_next_ones_at_home_again():
    async def scenario():
        async with places(2) as made:
            router = Router([place.keeper for place in made], batch_size=4)
            async with AsyncExitStack() as stack:
                assert [await place_of(stack, router, "a", num_samples=2) for _ in range(4)] == [
                    "place 0",
                    "place 0",
                    "place 1",
                    "place 1",
                ]
                assert await place_of(stack, router, "a") == "place 0"  # both are full
            async with AsyncExitStack() as stack:
                assert await place_of(stack, router, "a") == "place 0"

    run(scenario())


def test_a_session_moves_when_its_engine_dies_and_does_not_move_back():
    async def scenario():
        async with places(2) as made, AsyncExitStack() as stack:
            router = Router([place.keeper for place in made])
            assert await place_of(stack, router, "a") == "place 0"
            made[0].may_start.clear()
            made[0].link.lose()
            assert await place_of(stack, router, "a") == "place 1"
            made[0].may_start.set()
            await until(lambda: made[0].keeper.link is not None)
            assert await place_of(stack, router, "a") == "place 1"

    run(scenario())


def test_samples_wait_while_no_engine_runs():
    async def scenario():
        async with places(2) as made, AsyncExitStack() as stack:
            router = Router([place.keeper for place in made])
            for place in made:
                place.may_start.clear()
                place.link.lose()
            waiting = asyncio.create_task(place_of(stack, router, "a"))
            await until(lambda: made[1].num_starts == 2)
            assert not waiting.done()
            made[1].may_start.set()
            assert await waiting == "place 1"

    run(scenario())


def test_a_sample_goes_only_where_it_can_be_served():
    def refuse(sample):
        if sample.revision is not None:
            raise UnsupportedFeatureError("only bare base models")

    async def scenario():
        async with places(1, check=refuse) as plain, places(1) as full, AsyncExitStack() as stack:
            keepers = [place.keeper for place in (*plain, *full)]
            adapted = make_sample("r1", session="a")
            keeper, _ = await stack.enter_async_context(Router(keepers).place("a", adapted))
            assert keeper is keepers[1]
            with pytest.raises(UnsupportedFeatureError, match="only bare base models"):
                async with Router(keepers[:1]).place("a", adapted):
                    pass
            async with Router(keepers[:1]).place("a", make_sample(session="a")) as (keeper, _):
                assert keeper is keepers[0]

    run(scenario())


def test_a_sampler_without_engines_is_refused():
    with pytest.raises(ConfigurationError, match="at least one engine"):
        Router([])
