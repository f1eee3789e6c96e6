"""Calls to an engine over a real socket: answers, errors, cancelled callers, and engines that are gone."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.vllm_links.engines import connected, free_address, make_sample, run, served, write_weights
from tinker_core.errors import (
    CheckpointMismatchError,
    InvalidRequestError,
    TinkerError,
    UnknownCheckpointError,
    WorkerLostError,
)
from tinker_sampler_vllm.links import remote
from tinker_sampler_vllm.links.link import HealthChecks
from tinker_sampler_vllm.protocol import MAX_CALL_BYTES, LoadCall, PutCall


def test_weights_arrive_as_bytes_in_pieces_and_samples_come_from_them(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    content = bytes(range(250)) * 10

    async def scenario():
        address = free_address()
        async with served(address) as engine, connected(address) as link:
            assert link.description.base_model == "tiny"
            await link.load(LoadCall(revision="r/1", directory=write_weights(tmp_path / "weights", content)))
            assert engine.weights["r/1"] == {"adapter_config.json": b"", "adapter_model.safetensors": content}
            output = await link.sample(make_sample("r/1"))
            assert output.sequences[0].tokens == (0, 1, 2, 3)
            await link.retire("r/1")
            with pytest.raises(UnknownCheckpointError, match="r/1"):
                await link.sample(make_sample("r/1"))

    run(scenario())


def test_an_engine_refuses_weights_with_its_own_error_and_goes_on(tmp_path):
    async def scenario():
        address = free_address()
        async with served(address), connected(address) as link:
            with pytest.raises(CheckpointMismatchError, match="the adapter is bad"):
                await link.load(LoadCall(revision="r1", directory=write_weights(tmp_path / "weights", b"bad")))
            assert (await link.sample(make_sample())).sequences[0].tokens == (0,)

    run(scenario())


def test_weights_that_were_retired_before_they_were_sent_are_unknown(tmp_path):
    async def scenario():
        address = free_address()
        async with served(address), connected(address) as link:
            with pytest.raises(UnknownCheckpointError, match="r1"):
                await link.load(LoadCall(revision="r1", directory=str(tmp_path / "gone")))

    run(scenario())


def test_a_cancelled_caller_frees_the_place_of_its_sample():
    async def scenario():
        address = free_address()
        async with served(address) as engine, connected(address) as link:
            engine.open.clear()
            sample = make_sample()
            caller = asyncio.create_task(link.sample(sample))
            await engine.begun.wait()
            assert await link.is_waiting(sample.request_id)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            while engine.running:  # the command to cancel is on its way
                assert not await link.is_waiting("another")
            engine.open.set()
            assert (await link.sample(make_sample())).sequences

    run(scenario())


def test_all_calls_fail_as_soon_as_the_connection_to_an_engine_ends():
    async def scenario():
        address = free_address()
        async with AsyncExitStack() as stack:
            async with served(address) as engine:
                link = await stack.enter_async_context(connected(address))
                engine.open.clear()
                callers = [asyncio.create_task(link.sample(make_sample())) for _ in range(3)]
                await engine.begun.wait()
            assert "has ended" in await link.wait_lost()
            for caller in callers:
                with pytest.raises(WorkerLostError, match="has ended"):
                    await caller
            with pytest.raises(WorkerLostError):
                await link.sample(make_sample())

    run(scenario())


def test_an_error_that_turns_out_to_be_the_death_of_the_engine_is_no_answer():
    async def scenario():
        address = free_address()
        async with AsyncExitStack() as stack:
            async with served(address) as engine:
                link = await stack.enter_async_context(connected(address))

                async def fail(sample):
                    asyncio.get_running_loop().call_later(0.05, engine.died.set)
                    raise RuntimeError("Executor failed.")

                engine.sample = fail
                caller = asyncio.create_task(link.sample(make_sample()))
                await engine.died.wait()
            with pytest.raises(WorkerLostError, match="has ended"):
                await caller

    run(scenario())


def test_any_other_error_is_an_answer():
    async def scenario():
        address = free_address()
        async with served(address, death_seconds=0.01) as engine, connected(address) as link:

            async def fail(sample):
                raise RuntimeError("a defect")

            engine.sample = fail
            with pytest.raises(TinkerError, match="RuntimeError: a defect"):
                await link.sample(make_sample())

    run(scenario())


def test_a_silent_engine_is_given_up():
    async def scenario():
        address = free_address()
        checks = HealthChecks(interval=0.05, silence=0.3)
        async with served(address) as engine, connected(address, checks=checks) as link:
            engine.awake.clear()
            with pytest.raises(WorkerLostError, match="has not answered for"):
                await link.sample(make_sample())
            assert "has not answered for" in await link.wait_lost()
            engine.awake.set()

    run(scenario())


def test_nobody_at_an_address_is_reported_with_what_to_look_at():
    async def scenario():
        address = free_address()
        with pytest.raises(WorkerLostError, match="is it running, and do both sides have one secret"):
            async with connected(address, checks=HealthChecks(silence=0.3)):
                pass

    run(scenario())


def test_a_command_that_is_too_large_is_refused_before_it_is_sent():
    async def scenario():
        address = free_address()
        async with served(address), connected(address) as link:
            with pytest.raises(InvalidRequestError, match="too large"):
                await link.call("put", PutCall(revision="r", name="n", offset=0, data=bytes(MAX_CALL_BYTES)))
            assert (await link.sample(make_sample())).sequences

    run(scenario())


def test_names_of_files_cannot_leave_the_directory_of_their_revision():
    async def scenario():
        address = free_address()
        async with served(address), connected(address) as link:
            for name in ("../outside", "a/b", ""):
                with pytest.raises(InvalidRequestError, match="no plain file name"):
                    await link.call("put", PutCall(revision="r", name=name, offset=0, data=b"x"))
            with pytest.raises(InvalidRequestError, match="not the 5 before"):
                await link.call("put", PutCall(revision="r", name="n", offset=5, data=b"x"))

    run(scenario())
