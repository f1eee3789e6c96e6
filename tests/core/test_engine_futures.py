"""Results after they are gone, samples given up, and clients that were never heard of again."""

from __future__ import annotations

import asyncio

import pytest

from tests.core.conftest import Client, EngineFactory, ManualClock, forward_backward
from tests.core.test_engine_sampling import PROMPT, ephemeral, logprobs, open_sampler
from tinker_core.engine import Engine
from tinker_core.engine.clock import SystemClock
from tinker_core.engine.completions import PAGE_SIZE, CompletionLogs
from tinker_core.engine.futures import DELIVERED_SECONDS
from tinker_core.engine.request_ids import RequestIds
from tinker_core.errors import ResultGoneError, SessionFinishedError, UnknownRequestError
from tinker_core.types import (
    LOCAL_CALLER,
    LOCAL_OWNER,
    RequestError,
    SampleInput,
    SampleOutput,
    SamplerSaveKind,
    SampleTarget,
    SamplingParams,
    SaveWeightsForSamplerInput,
)

A_MINUTE = 60.0


async def sample(client: Client, sampler: str, seq_id: int) -> str:
    request = SampleInput(
        sampling_session_id=sampler, seq_id=seq_id, prompt=PROMPT, sampling_params=SamplingParams(max_tokens=2)
    )
    return (await client.engine.submit(request, LOCAL_CALLER)).request_id


# --- who learns what of an id -----------------------------------------------------------------------------------------


def test_only_its_owner_learns_that_an_id_was_ever_issued() -> None:
    ids, elsewhere = RequestIds(b"key"), RequestIds(b"another key")
    mine = ids.issue("me", 7)
    assert RequestIds(b"key").number_of(mine, "me") == 7
    assert ids.number_of(mine, "you") is None
    assert elsewhere.number_of(mine, "me") is None
    for wrong in ("", "req-", mine[:-1], mine + "A", mine[4:], "req-" + "é" * 36, "req-" + "*" * 36):
        assert ids.number_of(wrong, "me") is None
    assert len({ids.issue("me", 7) for _ in range(100)}) == 100


async def released(engine: Engine) -> None:
    """Return when no model is in memory any more."""
    async with asyncio.timeout(A_MINUTE):
        while engine.metrics()[0].resident_models:
            await asyncio.to_thread(lambda: None)  # lets the engine's own tasks run


async def until_gone(client: Client, request_id: str) -> None:
    """Ask for a result that is about to be pruned until it is."""

    async def ask() -> None:
        while True:
            await client.engine.retrieve(request_id, 0.0, LOCAL_OWNER)
            await asyncio.to_thread(lambda: None)  # lets the engine's own tasks run

    with pytest.raises(ResultGoneError):
        await ask()


def test_results_that_are_gone_are_told_apart_from_ids_of_nobody(open_engine: EngineFactory) -> None:
    async def body() -> None:
        clock = ManualClock()
        async with open_engine(clock=clock) as client:
            sampler = await open_sampler(client, base_model="tiny")
            request_id = await sample(client, sampler, 0)
            await client.result(request_id)
            await clock.advance(DELIVERED_SECONDS + 1)
            await client.result(await sample(client, sampler, 1))
            kept = await sample(client, sampler, 2)
            await until_gone(client, request_id)
            await client.engine.polls.cancel(request_id, LOCAL_OWNER)  # nothing is left to cancel
            for theirs in (request_id, kept, "made-up"):
                for ask in (
                    client.engine.retrieve(theirs, 0.0, "another"),
                    client.engine.polls.cancel(theirs, "another"),
                ):
                    with pytest.raises(UnknownRequestError):
                        await ask
        async with open_engine(clock=clock) as again:
            assert isinstance(await again.result(kept), SampleOutput)
            await until_gone(again, request_id)

    asyncio.run(body())


def test_the_clones_of_a_client_are_numbered_across_restarts(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            sampler = await open_sampler(client, base_model="tiny")
            first = await asyncio.gather(*(client.engine.join_sampling_session(sampler, LOCAL_OWNER) for _ in range(3)))
        async with open_engine() as again:
            second = await again.engine.join_sampling_session(sampler, LOCAL_OWNER)
        assert [*sorted(first), second] == [1, 2, 3, 4]

    asyncio.run(body())


# --- completion logs --------------------------------------------------------------------------------------------------


def test_a_log_pages_wakes_and_forgets() -> None:
    async def body() -> None:
        logs = CompletionLogs(SystemClock())
        target = SampleTarget.of("s:sample:0", 3 * 10**9 + 5)
        assert target.clone_id == 3
        nothing, cursor = await logs.page(target, 0, A_MINUTE)
        assert nothing == []
        polls = [asyncio.create_task(logs.page(target, cursor, A_MINUTE)) for _ in range(2)]
        await asyncio.sleep(0)
        logs.add(SampleTarget(sampling_session_id="other"), "of-another")
        logs.add(target, "first")
        (found, next_cursor), same = await asyncio.gather(*polls)
        assert found == ["first"]
        assert same == (found, next_cursor)
        assert await logs.page(target, cursor, A_MINUTE) == (["first"], next_cursor)  # the answer was lost: once more
        for number in range(PAGE_SIZE + 2):
            logs.add(target, str(number))
        logs.remove(target, "0")  # fetched meanwhile
        page, cursor = await logs.page(target, next_cursor, A_MINUTE)
        rest, last = await logs.page(target, cursor, A_MINUTE)
        assert [*page, *rest] == [str(number) for number in range(1, PAGE_SIZE + 2)]
        assert await logs.page(target, last, 0.0) == ([], last)
        assert set(logs._logs) == {SampleTarget(sampling_session_id="other")}
        logs.add(target, "later")  # a log that was dropped goes on where it was
        assert (await logs.page(target, last, A_MINUTE))[0] == ["later"]
        assert logs.issued(last)
        assert not any(logs.issued(foreign) for foreign in (0, 1, -1, last + 10**12))
        logs.recall(target, ["later", "of an earlier process"])
        found, last = await logs.page(target, 0, A_MINUTE)
        assert found == ["later", "of an earlier process"]
        assert await logs.page(target, last, 0.0) == ([], last)

    asyncio.run(body())


# --- silence ----------------------------------------------------------------------------------------------------------


def test_a_session_ends_after_a_long_silence_and_no_sooner(open_engine: EngineFactory) -> None:
    async def body() -> None:
        clock = ManualClock()
        async with open_engine(clock=clock, session_seconds=100.0) as client:
            engine = client.engine
            model_id = await client.create()
            await clock.advance(90.0)
            await engine.heartbeat(client.session_id, LOCAL_OWNER)
            await clock.advance(90.0)
            await client.run(forward_backward(model_id, 1))
            await clock.advance(90.0)
            assert (await engine.session(client.session_id, LOCAL_OWNER)).finished_at is None
            await clock.advance(11.0)
            await released(engine)
            record = await engine.session(client.session_id, LOCAL_OWNER)
            assert record.finish_reason == "interrupted"
            assert "100 seconds" in (record.finish_detail or "")
            with pytest.raises(SessionFinishedError):
                await engine.heartbeat(client.session_id, LOCAL_OWNER)
            assert engine.metrics()[0].resident_models == 0

    asyncio.run(body())


# --- weights that come and go -----------------------------------------------------------------------------------------


def test_an_inflight_target_moves_under_a_stream_of_samples(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine(max_revisions=2) as client:
            model_id = await client.create()
            sampler = await ephemeral(client, model_id, 1, 0, kind=SamplerSaveKind.INFLIGHT)
            frozen = await ephemeral(client, model_id, 2, 1)
            expected = await logprobs(client, frozen, 0)
            asked = [asyncio.create_task(logprobs(client, sampler, seq_id)) for seq_id in range(40)]
            for number in range(8):
                await ephemeral(client, model_id, 3 + number, 2 + number, kind=SamplerSaveKind.INFLIGHT)
                asked.append(asyncio.create_task(logprobs(client, sampler, 100 + number)))
            assert await asyncio.gather(*asked) == [expected] * 48  # the model never learned anything
            again = SaveWeightsForSamplerInput(model_id=model_id, seq_id=11, sampling_session_seq_id=1)
            taken = await client.run(again)  # a sampling session's number is never used twice
            assert isinstance(taken, RequestError)
            assert taken.category == "user"
            await client.engine.finish_session(client.session_id, "success", None, LOCAL_OWNER)
            assert client.engine.metrics()[0].resident_revisions == 0
            assert not client.engine._registry.inflight

    asyncio.run(body())
