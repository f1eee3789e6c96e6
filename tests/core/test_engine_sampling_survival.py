"""Samples whose workers, server or client go away."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.core.conftest import Client, EngineFactory, ManualClock
from tests.core.gate_sampler import Gate
from tests.core.test_engine_sampling import ephemeral, open_sampler, train
from tests.processes import kill_workers, ranks_of
from tinker_core.engine import NewSession, workers
from tinker_core.types import (
    LOCAL_CALLER,
    LOCAL_OWNER,
    BaseModelSpec,
    EngineOutput,
    ModelInput,
    RequestError,
    SampleInput,
    SampleOutput,
    SamplerSaveKind,
    SampleTarget,
    SamplingParams,
    SaveWeightsForSamplerInput,
    SaveWeightsOutput,
    UnloadModelInput,
)

A_MINUTE = 60.0


async def submit(client: Client, sampler: str, seq_id: int, first_token: int = 5, max_tokens: int = 8) -> str:
    request = SampleInput(
        sampling_session_id=sampler,
        seq_id=seq_id,
        prompt=ModelInput.from_ints([first_token, 7]),
        sampling_params=SamplingParams(max_tokens=max_tokens, seed=3),
    )
    return (await client.engine.submit(request, LOCAL_CALLER)).request_id


async def sampled(client: Client, sampler: str, seq_id: int, first_token: int = 5) -> SampleOutput:
    output = await client.result(await submit(client, sampler, seq_id, first_token))
    assert isinstance(output, SampleOutput), output
    return output


def code(output: EngineOutput) -> str:
    return output.code if isinstance(output, RequestError) else type(output).__name__


async def handed_over(client: Client, request_ids: list[str]) -> None:
    """Return when the sampler has all of some samples; nothing tells it but the engine's own books."""
    entries = [client.engine._futures.get(request_id, LOCAL_OWNER) for request_id in request_ids]
    while any(entry.started_at is None for entry in entries):  # noqa: ASYNC110
        await asyncio.sleep(0)


# --- workers that die -------------------------------------------------------------------------------------------------


def test_samples_in_progress_run_again_when_their_workers_die(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            base = await open_sampler(client, base_model="tiny")
            seq_id = await train(client, model_id, 1)
            live = await ephemeral(client, model_id, seq_id, 0)
            moving = await ephemeral(client, model_id, seq_id + 1, 1, kind=SamplerSaveKind.INFLIGHT)
            samplers = (base, live, moving)
            expected = [await sampled(client, sampler, 0) for sampler in samplers]
            assert expected[0] != expected[1] == expected[2]
            [rank] = ranks_of(os.getpid())
            os.kill(rank, signal.SIGSTOP)
            ids = [await submit(client, sampler, 1) for sampler in samplers]
            given_up = await submit(client, base, 2)
            await handed_over(client, [*ids, given_up])
            await client.engine.polls.cancel(given_up, LOCAL_OWNER)
            assert code(await client.result(given_up)) == "CancelledRequestError"
            kill_workers()
            assert await asyncio.gather(*(client.result(request_id) for request_id in ids)) == expected
            assert code(await client.result(given_up)) == "CancelledRequestError"
            # And the weights are still there for those who come later.
            assert [await sampled(client, sampler, 3) for sampler in samplers] == expected

    asyncio.run(body())


def test_a_sample_that_waits_for_workers_can_be_cancelled(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            sampler = await open_sampler(client, base_model="tiny")
            await client.engine.wait_ready()
            lost = asyncio.create_task(client.engine._bases["tiny"].group.wait_lost())
            kill_workers()
            await lost
            waiting = [await submit(client, sampler, seq_id) for seq_id in range(2)]
            await client.engine.polls.cancel(waiting[0], LOCAL_OWNER)
            assert code(await client.result(waiting[0])) == "CancelledRequestError"
            assert code(await client.result(waiting[1])) == "SampleOutput"

    asyncio.run(body())


def test_a_sample_that_kills_its_workers_fails_and_takes_nobody_with_it(
    open_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        gate = Gate()
        # It comes and goes with the workers, as the samplers in their ranks do.
        monkeypatch.setattr(workers, "GroupSampler", lambda group, capabilities: gate.new_sampler())
        async with open_engine() as client:
            sampler = await open_sampler(client, base_model="tiny")
            killer, innocent = [await submit(client, sampler, seq_id, 10 + seq_id) for seq_id in range(2)]
            for _ in range(2):
                assert {(await gate.started.get()).request_id for _ in range(2)} == {killer, innocent}
                kill_workers()
            # Now they run one by one, and only the one under which the workers die once more is given up.
            first = await gate.started.get()
            while first.request_id != killer:
                gate.opened(11).set()
                first = await gate.started.get()
            kill_workers()
            failed = await client.result(killer)
            assert isinstance(failed, RequestError)
            assert (failed.code, failed.category) == ("WorkerLostError", "server")
            assert "3 times" in failed.message
            gate.opened(11).set()
            assert code(await client.result(innocent)) == "SampleOutput"

    asyncio.run(body())


def test_a_sampler_beside_the_workers_goes_on_without_them(open_engine: EngineFactory) -> None:
    async def body() -> None:
        gate = Gate()
        async with open_engine(sampler="gate", more_plugins={"gate": gate}) as client:
            sampler = await open_sampler(client, base_model="tiny")
            model_id = await client.create()
            first = await submit(client, sampler, 0, 10)
            assert (await gate.started.get()).request_id == first
            kill_workers()
            second = await submit(client, sampler, 1, 11)
            assert (await gate.started.get()).request_id == second
            await train(client, model_id, 1)  # the workers come back
            assert client.engine.metrics()[0].worker_losses == 1
            for prompt in (10, 11):
                gate.opened(prompt).set()
            assert [code(await client.result(name)) for name in (first, second)] == ["SampleOutput"] * 2
            assert gate.num_samplers == 1

    asyncio.run(body())


def test_a_base_model_that_is_only_sampled_from_needs_no_workers_beside_its_sampler(open_engine: EngineFactory) -> None:
    async def body() -> None:
        gate = Gate()
        gate.opened(10).set()
        base_model = BaseModelSpec(name="tiny", path="tiny", trainable=False)
        async with open_engine(sampler="gate", more_plugins={"gate": gate}, base_models=(base_model,)) as client:
            sampler = await open_sampler(client, base_model="tiny")
            assert code(await client.result(await submit(client, sampler, 0, 10))) == "SampleOutput"
            assert ranks_of(os.getpid()) == {}
            [model] = client.engine.supported_models()
            assert (model.trainable, model.sampleable, model.max_context_length) == (False, True, 64)
            refused = await client.run(client.create_input(0))
            assert isinstance(refused, RequestError)
            assert "sampling only" in refused.message

    asyncio.run(body())


def test_a_sample_fails_with_the_reason_why_its_base_model_cannot_start(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine(more_plugins={"gate": Gate()}, sampler="gate", executor="none") as client:
            sampler = await open_sampler(client, base_model="tiny")
            output = await client.result(await submit(client, sampler, 0))
            assert isinstance(output, RequestError)
            assert "executor 'none'" in output.message

    asyncio.run(body())


# --- servers that stop ------------------------------------------------------------------------------------------------


def test_samples_and_ephemeral_weights_outlive_the_server(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            seq_id = await train(client, model_id, 1)
            live = await ephemeral(client, model_id, seq_id, 0)
            old = await ephemeral(client, model_id, seq_id + 1, 1, kind=SamplerSaveKind.INFLIGHT)
            expected = await sampled(client, live, 0)
            seq_id = await train(client, model_id, seq_id + 2)
            moving = await ephemeral(client, model_id, seq_id, 2, kind=SamplerSaveKind.INFLIGHT)
            newest = await sampled(client, moving, 0)
            assert newest != expected
            target = SampleTarget(sampling_session_id=live)
            cursor = (await told(client, target, 0))[1]
            # One result that its client was not told of, and one that is not there yet.
            untold = await submit(client, live, 1)
            await client.result(untold)
            [rank] = ranks_of(os.getpid())
            os.kill(rank, signal.SIGSTOP)
            outstanding = await submit(client, old, 5)
            await handed_over(client, [outstanding])
            kill_workers()
        async with open_engine() as again:
            found, cursor = await told(again, target, cursor)
            assert untold in found
            assert await told(again, target, cursor, timeout=0.0) == ([], cursor)
            assert await again.result(untold) == expected
            assert await again.result(outstanding) == newest  # the target has moved on
            new = await submit(again, live, 2)
            assert (await told(again, target, cursor))[0] == [new]
            assert await again.result(new) == expected
            assert await sampled(again, old, 6) == await sampled(again, moving, 6) == newest
            # The model goes, with the last of its weights in the sampler only: they stay for those who sample.
            seq_id = await train(again, model_id, seq_id + 1, 1)
            last = await ephemeral(again, model_id, seq_id, 3)
            expected_last = await sampled(again, last, 0)
            kill_workers()
            assert code(await again.run(UnloadModelInput(model_id=model_id))) == "UnloadModelOutput"
            assert await sampled(again, last, 1) == expected_last
            assert again.engine.metrics()[0].resident_models == 0
            await again.engine.finish_session(client.session_id, "success", None, LOCAL_OWNER)
            assert again.engine.metrics()[0].resident_revisions == 0
            assert again.engine._bases["tiny"].revisions.ephemeral() == []

    asyncio.run(body())


def test_weights_on_disk_are_read_again_and_never_when_they_are_damaged(
    open_engine: EngineFactory, tmp_path: Path
) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            live = await ephemeral(client, model_id, await train(client, model_id, 1), 0)
            expected = await sampled(client, live, 0)
            await client.engine.drain(A_MINUTE)
        (weights,) = (tmp_path / "data" / "revisions").glob("*/*/weights.npz")
        async with open_engine() as again:
            assert again.engine.metrics()[0].stored_revisions == 1
            assert await sampled(again, live, 1) == expected
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        async with open_engine() as last:
            output = await last.result(await submit(last, live, 2))
            assert isinstance(output, RequestError)
            assert (output.code, str(weights) in output.message) == ("DamagedRecordError", True)

    asyncio.run(body())


async def told(
    client: Client,
    target: SampleTarget,
    cursor: int,
    timeout: float = A_MINUTE,  # noqa: ASYNC109
) -> tuple[list[str], int]:
    page = await client.engine.polls.completions(target, LOCAL_OWNER, cursor=cursor, timeout=timeout)
    return [completion.request_id for completion in page.completions], page.cursor


def test_weights_of_a_deleted_checkpoint_are_refused_by_name_after_a_restart(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine(max_revisions=1) as client:
            model_id = await client.create()
            saved: Any = await client.run(SaveWeightsForSamplerInput(model_id=model_id, seq_id=1, path="final"))
            assert isinstance(saved, SaveWeightsOutput)
            sampler = await open_sampler(client, model_path=saved.path or "")
            expected = await sampled(client, sampler, 0)
            await client.engine.library.delete(saved.path or "", LOCAL_CALLER)
            other = await ephemeral(client, model_id, 2, 0)
            await sampled(client, other, 0)  # which takes the only place in the sampler
            assert await sampled(client, sampler, 1) == expected
        async with open_engine() as again:
            output = await again.result(await submit(again, sampler, 2))
            assert code(output) == "UnknownCheckpointError"

    asyncio.run(body())


# --- clients that are gone --------------------------------------------------------------------------------------------


def test_without_a_sign_of_life_samples_that_have_not_begun_are_dropped(open_engine: EngineFactory) -> None:
    async def body() -> None:
        clock, gate = ManualClock(), Gate(slots=1)
        settings: dict[str, Any] = {"sampler": "gate", "more_plugins": {"gate": gate}, "clock": clock}
        async with open_engine(**settings, unseen_seconds=900.0) as client:
            sampler = await open_sampler(client, base_model="tiny")
            running = await submit(client, sampler, 0)
            await gate.started.get()
            waiting = await submit(client, sampler, 1)
            await handed_over(client, [waiting])
            for _ in range(3):  # polls and heartbeats both are signs of life
                await clock.advance(800.0)
                await client.engine.heartbeat(client.session_id, LOCAL_OWNER)
                await clock.advance(800.0)
                await client.engine.polls.queue_status(waiting, LOCAL_OWNER)
            other = Client(client.engine, (await client.engine.create_session(NewSession())).session_id)
            await clock.advance(700.0)
            kept = await submit(other, await open_sampler(other, base_model="tiny"), 0)
            await clock.advance(201.0)
            dropped = await client.result(waiting)
            assert isinstance(dropped, RequestError)
            assert (dropped.code, dropped.category) == ("UnseenClientError", "user")
            assert "900 seconds" in dropped.message
            assert gate.cancelled == [waiting]
            gate.opened(5).set()
            assert code(await client.result(running)) == "SampleOutput"
            assert code(await client.result(kept)) == "SampleOutput"
            assert (await client.engine.session(client.session_id, LOCAL_OWNER)).finished_at is None

    asyncio.run(body())


# --- one at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_in_deterministic_mode_one_sample_runs_at_a_time(open_engine: EngineFactory, deterministic: bool) -> None:
    async def body() -> None:
        gate = Gate()
        async with open_engine(sampler="gate", more_plugins={"gate": gate}, deterministic=deterministic) as client:
            sampler = await open_sampler(client, base_model="tiny")
            ids = [await submit(client, sampler, seq_id, 10 + seq_id) for seq_id in range(3)]
            if not deterministic:
                assert [(await gate.started.get()).request_id for _ in ids] == ids
            for number, request_id in enumerate(ids):
                if deterministic:
                    assert (await gate.started.get()).request_id == request_id
                    assert gate.started.empty()
                    if number == 0:  # whoever waits for its turn can be cancelled, too
                        await client.engine.polls.cancel(ids[2], LOCAL_OWNER)
                        assert code(await client.result(ids[2])) == "CancelledRequestError"
                        ids.pop()
                gate.opened(10 + number).set()
                assert code(await client.result(request_id)) == "SampleOutput"

    asyncio.run(body())
