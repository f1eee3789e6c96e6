from __future__ import annotations

import asyncio

import attrs
import numpy as np
import pytest

from tests.core.conftest import Client, EngineFactory, ManualClock, datum, forward_backward, optim_step
from tinker_core.engine import NewSession
from tinker_core.errors import SessionFinishedError, UnknownRequestError, UnknownSessionError
from tinker_core.testing.graph_builder import clipped_policy_loss
from tinker_core.types import (
    LOCAL_CALLER,
    LOCAL_OWNER,
    CreateCustomLossInput,
    CreateModelOutput,
    ForwardBackwardOutput,
    OptimStepOutput,
    RequestError,
    RequestType,
)


def test_a_model_learns_and_its_id_is_what_the_sdk_derives(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create(3)
            assert model_id == f"{client.session_id}:train:3"
            losses = []
            for step in range(10):
                output = await client.run(forward_backward(model_id, 2 * step + 1))
                assert isinstance(output, ForwardBackwardOutput)
                losses.append(output.metrics["loss:sum"])
                stepped = await client.run(optim_step(model_id, 2 * step + 2))
                assert isinstance(stepped, OptimStepOutput)
                assert stepped.metrics["grad_norm"] > 0
            assert losses[-1] < losses[0] / 2

    asyncio.run(body())


def test_requests_that_arrive_as_2_3_1_run_in_order(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            third = await client.engine.submit(forward_backward(model_id, 3), LOCAL_CALLER)
            second = await client.engine.submit(forward_backward(model_id, 2), LOCAL_CALLER)
            assert await client.engine.retrieve(second.request_id, 0.05, LOCAL_OWNER) is None
            first = await client.engine.submit(forward_backward(model_id, 1), LOCAL_CALLER)
            for accepted in (first, second, third):
                assert isinstance(await client.result(accepted.request_id), ForwardBackwardOutput)

    asyncio.run(body())


def test_a_gap_ends_at_its_deadline_on_the_injected_clock(open_engine: EngineFactory) -> None:
    async def body() -> None:
        clock = ManualClock()
        async with open_engine(clock=clock) as client:
            model_id = await client.create()
            accepted = await client.engine.submit(forward_backward(model_id, 2), LOCAL_CALLER)
            assert await client.engine.retrieve(accepted.request_id, 0.05, LOCAL_OWNER) is None
            await clock.advance(601)
            assert isinstance(await client.result(accepted.request_id), ForwardBackwardOutput)
            late = await client.run(forward_backward(model_id, 1))
            assert isinstance(late, RequestError)
            assert late.code == "SkippedSequenceError"

    asyncio.run(body())


def test_a_repeat_gets_the_first_receipt_and_runs_once(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            create = client.create_input()
            receipts = [await client.engine.submit(create, LOCAL_CALLER) for _ in range(2)]
            assert receipts[0] == receipts[1]
            assert isinstance(await client.result(receipts[0].request_id), CreateModelOutput)
            model_id = f"{client.session_id}:train:0"
            receipts = [await client.engine.submit(forward_backward(model_id, 1), LOCAL_CALLER) for _ in range(2)]
            assert receipts[0] == receipts[1]
            once = await client.run(optim_step(model_id, 2))
            other = await client.create(1)
            await client.run(forward_backward(other, 1))
            assert once == await client.run(optim_step(other, 2))
            loss = CreateCustomLossInput(session_id=client.session_id, custom_loss_seq_id=0, loss=clipped_policy_loss())
            receipts = [await client.engine.submit(loss, LOCAL_CALLER) for _ in range(2)]
            assert receipts[0] == receipts[1]

    asyncio.run(body())


def test_a_waiting_poll_wakes_with_the_result(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            second = await client.engine.submit(forward_backward(model_id, 2), LOCAL_CALLER)
            polls = [asyncio.create_task(client.result(second.request_id)) for _ in range(3)]
            await asyncio.sleep(0)
            assert not any(poll.done() for poll in polls)
            await client.engine.submit(forward_backward(model_id, 1), LOCAL_CALLER)
            results = await asyncio.gather(*polls)
            assert all(result is results[0] for result in results)

    asyncio.run(body())


def test_a_failed_request_fails_its_own_future_only(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            good, bad = await client.create(0), await client.create(1)
            requests = [
                forward_backward(good, 1),
                forward_backward(bad, 1, datum([1, 2, 3], [1, 2, 9999])),
                forward_backward(bad, 2),
            ]
            accepted = [await client.engine.submit(request, LOCAL_CALLER) for request in requests]
            first, failed, second = [await client.result(a.request_id) for a in accepted]
            assert isinstance(first, ForwardBackwardOutput)
            assert isinstance(failed, RequestError)
            assert (failed.category, failed.code) == ("user", "InvalidDatumError")
            assert isinstance(second, ForwardBackwardOutput)

    asyncio.run(body())


async def _error(client: Client, request: object) -> RequestError:
    output = await client.run(request)  # type: ignore[arg-type]
    assert isinstance(output, RequestError), output
    return output


def test_errors_of_training_requests_are_results(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            unknown_base = await _error(client, client.create_input(0, base_model="other"))
            assert unknown_base.code == "UnknownBaseModelError"
            assert "'tiny'" in unknown_base.message
            assert (await _error(client, client.create_input(1, rank=4096))).code == "InvalidLoraConfigError"
            assert (await _error(client, forward_backward("nobody:train:0", 1))).code == "UnknownModelError"
            # A model whose creation failed does not exist.
            failed = f"{client.session_id}:train:1"
            assert (await _error(client, forward_backward(failed, 1))).code == "UnknownModelError"

    asyncio.run(body())


def test_a_request_that_could_not_be_decoded_keeps_its_place(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            error = RequestError(category="user", code="InvalidRequestError", message="bad tensor")
            receipts = [
                await client.engine.submit_failed(model_id, 1, RequestType.FORWARD_BACKWARD, error, LOCAL_CALLER)
                for _ in range(2)
            ]
            assert receipts[0] == receipts[1]
            assert await client.result(receipts[0].request_id) == error
            assert isinstance(await client.run(forward_backward(model_id, 2)), ForwardBackwardOutput)

    asyncio.run(body())


def test_what_is_answered_at_once_raises(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            with pytest.raises(UnknownRequestError):
                await client.engine.retrieve("req-unknown", 0.0, LOCAL_OWNER)
            accepted = await client.engine.submit(client.create_input(), LOCAL_CALLER)
            with pytest.raises(UnknownRequestError):
                await client.engine.retrieve(accepted.request_id, 0.0, "somebody else")
            stranger = attrs.evolve(client.create_input(1), session_id="s-unknown")
            with pytest.raises(UnknownSessionError):
                await client.engine.submit(stranger, LOCAL_CALLER)

    asyncio.run(body())


def test_a_finished_session_refuses_new_work_and_frees_its_models(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine(max_models=1) as client:
            model_id = await client.create()
            await client.engine.finish_session(client.session_id, "success", None, LOCAL_OWNER)
            await client.engine.finish_session(client.session_id, "errored", "again", LOCAL_OWNER)
            record = await client.engine.session(client.session_id, LOCAL_OWNER)
            assert record.finish_reason == "success"
            with pytest.raises(SessionFinishedError):
                await client.engine.submit(forward_backward(model_id, 1), LOCAL_CALLER)
            with pytest.raises(SessionFinishedError):
                await client.engine.submit(client.create_input(1), LOCAL_CALLER)
            assert (await client.engine.training_run(model_id, LOCAL_OWNER)).base_model == "tiny"
            other = Client(client.engine, (await client.engine.create_session(NewSession())).session_id)
            await other.create()  # the only model slot is free again

    asyncio.run(body())


def test_models_of_one_pass_get_their_own_results(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            models = [await client.create(i, rank=2 + i) for i in range(4)]
            data = [datum([i + 1, i + 2, i + 3]) for i in range(4)]
            together = await asyncio.gather(
                *(client.run(forward_backward(m, 1, d)) for m, d in zip(models, data, strict=True))
            )
            for index, output in enumerate(together):
                assert isinstance(output, ForwardBackwardOutput)
                alone = await client.run(forward_backward(models[index], 2, data[index]))
                assert isinstance(alone, ForwardBackwardOutput)
                np.testing.assert_array_equal(
                    output.loss_fn_outputs[0]["logprobs"].data, alone.loss_fn_outputs[0]["logprobs"].data
                )

    asyncio.run(body())
