"""Whose engine it is: one server's at a time."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
import zmq
import zmq.asyncio

from tests.vllm_links.engines import (
    SECRET,
    claim_of,
    connected,
    free_address,
    make_sample,
    run,
    served,
    write_weights,
)
from tinker_core.encoding import Encoder
from tinker_core.errors import CapacityError, ConfigurationError, WorkerLostError
from tinker_core.types import RequestError
from tinker_sampler_vllm.links.link import HealthChecks
from tinker_sampler_vllm.protocol import ERROR, ClaimCall, LoadCall
from tinker_sampler_vllm.security import secure_client


def test_a_second_server_is_refused_while_the_first_one_uses_the_engine(tmp_path):
    async def scenario():
        address = free_address()
        async with served(address) as engine, connected(address, claim_of("first")) as first:
            await first.load(LoadCall(revision="r1", directory=write_weights(tmp_path / "weights", b"abcd")))
            with pytest.raises(CapacityError, match="give each server engines of its own"):
                async with connected(address, claim_of("second")):
                    pass
            assert set(engine.weights) == {"r1"}
            assert (await first.sample(make_sample("r1"))).sequences[0].tokens == tuple(b"abcd")

    run(scenario())


def test_questions_about_its_health_keep_an_engine_for_an_idle_server():
    async def scenario():
        address = free_address()
        checks = HealthChecks(interval=0.05)
        async with served(address, claim_seconds=0.5) as engine, connected(address, claim_of("first"), checks=checks):
            asked = asyncio.Event()
            num_asked = 0

            async def check():
                nonlocal num_asked
                num_asked += 1
                if num_asked == 15:  # more than the time that a silent server would keep it for
                    asked.set()

            engine.check = check
            await asked.wait()
            with pytest.raises(CapacityError):
                async with connected(address, claim_of("second")):
                    pass

    run(scenario())


def test_another_server_may_take_an_engine_whose_server_fell_silent():
    async def scenario():
        address = free_address()
        never = HealthChecks(interval=1000.0)
        async with served(address, claim_seconds=0.0) as engine, AsyncExitStack() as stack:
            first = await stack.enter_async_context(connected(address, claim_of("first"), checks=never))
            engine.open.clear()
            orphan = asyncio.create_task(first.sample(make_sample()))
            await engine.begun.wait()
            second = await stack.enter_async_context(connected(address, claim_of("second")))
            assert not engine.running
            with pytest.raises(CapacityError, match="works for another server now"):
                await first.sample(make_sample())
            engine.open.set()
            assert (await second.sample(make_sample())).sequences
            first.lose("it learns so from its next question")
            with pytest.raises(WorkerLostError):
                await orphan

    run(scenario())


def test_a_server_that_lost_its_engine_to_another_learns_so_from_its_next_question():
    async def scenario():
        address = free_address()
        checks = HealthChecks(interval=0.3)
        async with served(address, claim_seconds=0.0), AsyncExitStack() as stack:
            first = await stack.enter_async_context(connected(address, claim_of("first"), checks=checks))
            await stack.enter_async_context(connected(address, claim_of("second")))
            assert "works for another server now" in await first.wait_lost()

    run(scenario())


def test_a_server_that_starts_again_takes_its_engine_at_once_and_finds_it_empty(tmp_path):
    async def scenario():
        address = free_address()
        async with served(address) as engine, AsyncExitStack() as stack:
            earlier = await stack.enter_async_context(connected(address, claim_of("same")))
            await earlier.load(LoadCall(revision="r1", directory=write_weights(tmp_path / "weights", b"abcd")))
            engine.open.clear()
            lost = asyncio.create_task(earlier.sample(make_sample("r1")))
            await engine.begun.wait()
            earlier.lose("its process was killed")
            later = await stack.enter_async_context(connected(address, claim_of("same")))
            assert not engine.weights
            assert not engine.running
            engine.open.set()
            assert (await later.sample(make_sample())).sequences[0].tokens == (0,)
            with pytest.raises(WorkerLostError):
                await lost

    run(scenario())


def test_weights_that_are_being_loaded_for_one_owner_are_gone_for_the_next(tmp_path):
    async def scenario():
        address = free_address()
        async with served(address) as engine, AsyncExitStack() as stack:
            earlier = await stack.enter_async_context(connected(address, claim_of("same")))
            begun, go = asyncio.Event(), asyncio.Event()
            load = engine.load

            async def slow(revision, directory):
                begun.set()
                await go.wait()
                await load(revision, directory)

            engine.load = slow
            call = LoadCall(revision="r1", directory=write_weights(tmp_path / "weights", b"abcd"))
            loading = asyncio.create_task(earlier.load(call))
            await begun.wait()
            claiming = asyncio.create_task(stack.enter_async_context(connected(address, claim_of("same"))))
            asyncio.get_running_loop().call_later(0.2, go.set)
            await claiming
            assert engine.num_loads == 1
            assert not engine.weights
            await loading

    run(scenario())


def test_a_server_that_stops_frees_the_engine_for_others_and_leaves_it_running(tmp_path):
    async def scenario():
        address = free_address()
        async with served(address) as engine:
            async with connected(address, claim_of("first")) as first:
                await first.load(LoadCall(revision="r1", directory=write_weights(tmp_path / "weights", b"abcd")))
            assert not engine.weights
            async with connected(address, claim_of("second")) as second:
                assert (await second.sample(make_sample())).sequences

    run(scenario())


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"base_model": "other"}, "this engine serves 'tiny' in float32, not 'other' in float32"),
        ({"dtype": "bfloat16"}, "this engine serves 'tiny' in float32, not 'tiny' in bfloat16"),
        ({"deterministic": True}, "start it with --deterministic"),
    ],
)
def test_an_engine_of_another_kind_is_refused_by_name_and_stays_with_its_owner(wanted, message):
    async def scenario():
        address = free_address()
        async with served(address), connected(address, claim_of("first")) as first:
            with pytest.raises(ConfigurationError, match=message):
                async with connected(address, claim_of("first", **wanted)):
                    pass
            assert (await first.sample(make_sample())).sequences

    run(scenario())


def test_a_sampler_of_another_release_is_told_which_both_sides_speak():
    async def scenario():
        address = free_address()
        encoder = Encoder()
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
            secure_client(socket, SECRET)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(address)
            async with served(address):
                body = encoder.encode(claim_of(), ClaimCall)
                await socket.send_multipart([b"call 99", b"1", b"claim", body])
                kind, call_id, answer = await socket.recv_multipart()
        error = encoder.decode(answer, RequestError)
        assert (kind, call_id, error.code) == (ERROR, b"1", "ConfigurationError")
        assert "'call 99'" in error.message
        assert "'call 1'" in error.message
        assert "install one release" in error.message

    run(scenario())
