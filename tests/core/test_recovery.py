"""What was accepted survives the end of any process, and a client notices nothing but time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.core.conftest import Client, EngineFactory, datum, forward_backward, optim_step
from tests.processes import kill_workers
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.payloads import Payloads
from tinker_core.types import (
    LOCAL_CALLER,
    LOCAL_OWNER,
    AcceptedRequest,
    CreateModelInput,
    EngineOutput,
    ForwardBackwardOutput,
    LoadWeightsInput,
    LoraConfig,
    RequestError,
    SaveWeightsInput,
    SaveWeightsOutput,
)

PROBE = datum([5, 6, 7, 8, 9])
STEPS = [[datum([1 + i, 2, 3, 4 + i]), datum([9, 8 - i, 7])] for i in range(4)]


async def submit(client: Client, model_id: str, first_seq_id: int, steps: list[list[Any]]) -> list[AcceptedRequest]:
    """Steps of two passes each."""
    accepted = []
    seq_id = first_seq_id
    for data in steps:
        step = (
            forward_backward(model_id, seq_id, data[0]),
            forward_backward(model_id, seq_id + 1, data[1]),
            optim_step(model_id, seq_id + 2),
        )
        accepted += [await client.engine.submit(request, LOCAL_CALLER) for request in step]
        seq_id += 3
    return accepted


async def work(client: Client, model_id: str, first_seq_id: int, steps: list[list[Any]]) -> list[EngineOutput]:
    """Steps that are all submitted before the first result is waited for."""
    accepted = await submit(client, model_id, first_seq_id, steps)
    return [await client.result(each.request_id) for each in accepted]


async def logprobs(client: Client, model_id: str, seq_id: int) -> np.ndarray:
    """What the model says of some tokens: a fingerprint of its weights."""
    output = await client.run(forward_backward(model_id, seq_id, PROBE, forward_only=True))
    assert isinstance(output, ForwardBackwardOutput), output
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()


async def undisturbed(open_engine: EngineFactory, num_steps: int, *, half: bool = False) -> np.ndarray:
    async with open_engine() as client:
        model_id = await client.create(77)
        await work(client, model_id, 1, STEPS[:num_steps])
        seq_id = 1 + 3 * num_steps
        if half:
            await client.run(forward_backward(model_id, seq_id, STEPS[0][0]))
            await client.run(optim_step(model_id, seq_id + 1))
            seq_id += 2
        return await logprobs(client, model_id, seq_id)


@pytest.mark.parametrize("settings", [{}, {"snapshot_steps": 1}])
def test_a_model_and_what_it_accumulated_survive_a_restart(
    open_engine: EngineFactory, settings: dict[str, Any]
) -> None:
    async def body() -> None:
        expected = await undisturbed(open_engine, 2, half=True)
        async with open_engine(**settings) as client:
            model_id = await client.create()
            before = await work(client, model_id, 1, STEPS[:2])
            await client.run(forward_backward(model_id, 7, STEPS[0][0]))
            accepted = await client.engine.submit(forward_backward(model_id, 1, STEPS[0][0]), LOCAL_CALLER)
        async with open_engine(**settings) as again:
            # A result that was delivered has no second version, and a repeated request gets the first one's receipt.
            repeated = await again.engine.submit(forward_backward(model_id, 1, STEPS[0][0]), LOCAL_CALLER)
            assert repeated == accepted
            first = await again.result(accepted.request_id)
            assert isinstance(first, ForwardBackwardOutput)
            assert isinstance(before[0], ForwardBackwardOutput)
            assert first.metrics == before[0].metrics
            await again.run(optim_step(model_id, 8))
            np.testing.assert_array_equal(await logprobs(again, model_id, 9), expected)

    asyncio.run(body())


def test_what_was_accepted_and_did_not_run_yet_runs_after_the_restart(open_engine: EngineFactory) -> None:
    async def body() -> None:
        expected = await undisturbed(open_engine, 4)
        async with open_engine() as client:
            model_id = await client.create()
            accepted = await submit(client, model_id, 1, STEPS)
            last = await client.engine.submit(client.create_input(1), LOCAL_CALLER)
        async with open_engine() as again:
            results = [await again.result(each.request_id) for each in accepted]
            assert not [result for result in results if isinstance(result, RequestError)]
            np.testing.assert_array_equal(await logprobs(again, model_id, 13), expected)
            assert not isinstance(await again.result(last.request_id), RequestError)

    asyncio.run(body())


@pytest.mark.parametrize("settings", [{}, {"snapshot_steps": 1}])
def test_lost_workers_lose_nothing(open_engine: EngineFactory, settings: dict[str, Any]) -> None:
    async def body() -> None:
        expected = await undisturbed(open_engine, 4)
        async with open_engine(**settings) as client:
            model_id = await client.create()
            await work(client, model_id, 1, STEPS[:1])
            kill_workers()
            await work(client, model_id, 4, STEPS[1:2])
            running = asyncio.create_task(work(client, model_id, 7, STEPS[2:]))
            await asyncio.sleep(0)
            kill_workers()
            assert not [result for result in await running if isinstance(result, RequestError)]
            np.testing.assert_array_equal(await logprobs(client, model_id, 13), expected)

    asyncio.run(body())


def test_more_models_than_memory_take_turns(open_engine: EngineFactory) -> None:
    async def body() -> None:
        expected = await undisturbed(open_engine, 2)
        async with open_engine(max_resident_models=2) as client:
            models = [await client.create(i) for i in range(5)]
            for step in range(2):
                await asyncio.gather(
                    *(work(client, model_id, 1 + 3 * step, STEPS[step : step + 1]) for model_id in models)
                )
            for model_id in models:
                np.testing.assert_array_equal(await logprobs(client, model_id, 7), expected)
            (metrics,) = client.engine.metrics()
            assert metrics.resident_models == 2
        async with open_engine(max_resident_models=2) as again:
            for model_id in models:
                np.testing.assert_array_equal(await logprobs(again, model_id, 8), expected)

    asyncio.run(body())


def test_loads_and_failed_requests_keep_their_place(open_engine: EngineFactory, tmp_path: Path) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            await work(client, model_id, 1, STEPS[:1])
            saved = await client.run(SaveWeightsInput(model_id=model_id, seq_id=4, path="one"))
            assert isinstance(saved, SaveWeightsOutput)
            assert saved.path is not None
            await work(client, model_id, 5, STEPS[1:2])
            failed = await client.run(forward_backward(model_id, 8, datum([1, 2], [70, 1])))
            assert isinstance(failed, RequestError)
            expected = await logprobs(client, model_id, 9)
            load = LoadWeightsInput(
                path=saved.path, optimizer=True, session_id=client.session_id, model_seq_id=5, model_id=None
            )
            other: Any = await client.run(load)
            assert not isinstance(other, RequestError), other
            await work(client, other.model_id, 1, STEPS[1:2])
            np.testing.assert_array_equal(await logprobs(client, other.model_id, 4), expected)
            reload = LoadWeightsInput(path=saved.path, optimizer=True, model_id=model_id, seq_id=10)
            assert not isinstance(await client.run(reload), RequestError)
            await client.engine.library.delete(saved.path, LOCAL_CALLER)
            await work(client, model_id, 11, STEPS[1:2])
        async with open_engine() as again:
            np.testing.assert_array_equal(await logprobs(again, model_id, 14), expected)
            np.testing.assert_array_equal(await logprobs(again, other.model_id, 5), expected)

    asyncio.run(body())


def test_a_seed_that_the_server_drew_is_drawn_once(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            request = CreateModelInput(
                session_id=client.session_id, model_seq_id=0, base_model="tiny", lora_config=LoraConfig(rank=4)
            )
            created: Any = await client.run(request)
            await work(client, created.model_id, 1, STEPS[:2])
            expected = await logprobs(client, created.model_id, 7)
        async with open_engine() as again:
            np.testing.assert_array_equal(await logprobs(again, created.model_id, 8), expected)
            assert (await again.engine.training_run(created.model_id, LOCAL_OWNER)).lora_config.seed is not None

    asyncio.run(body())


def test_nobody_waits_for_the_save_of_another_model(
    open_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_answers = asyncio.Event()
    save = Checkpoints.save

    @asynccontextmanager
    async def slow_save(self: Checkpoints, *args: Any, **kwargs: Any) -> AsyncIterator[Path]:
        async with save(self, *args, **kwargs) as directory:
            yield directory
            await store_answers.wait()

    monkeypatch.setattr(Checkpoints, "save", slow_save)

    async def body() -> None:
        async with open_engine(max_resident_models=2) as client:
            slow, quick, third = [await client.create(i) for i in range(3)]
            await work(client, slow, 1, STEPS[:1])
            saving = await client.engine.submit(SaveWeightsInput(model_id=slow, seq_id=4, path="one"), LOCAL_CALLER)
            next_steps = await submit(client, slow, 5, STEPS[1:2])
            await work(client, quick, 1, STEPS[:2])
            await work(client, third, 1, STEPS[:2])  # needs room, and not that of the model which is being saved
            assert await client.engine.retrieve(saving.request_id, 0.0, LOCAL_OWNER) is None
            store_answers.set()
            assert isinstance(await client.result(saving.request_id), SaveWeightsOutput)
            for accepted in next_steps:
                assert not isinstance(await client.result(accepted.request_id), RequestError)
            np.testing.assert_array_equal(await logprobs(client, slow, 8), await logprobs(client, quick, 7))

    asyncio.run(body())


def test_bodies_that_memory_has_no_room_for_wait_in_the_journal(
    open_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        expected = await undisturbed(open_engine, 4)
        monkeypatch.setattr(Payloads.__init__, "__defaults__", (600,))  # bytes: a request or two
        async with open_engine() as client:
            model_id = await client.create()
            assert not [result for result in await work(client, model_id, 1, STEPS) if isinstance(result, RequestError)]
            np.testing.assert_array_equal(await logprobs(client, model_id, 13), expected)

    asyncio.run(body())
