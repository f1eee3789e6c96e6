from __future__ import annotations

import asyncio
from typing import Any

import attrs
import pytest

from tests.core.conftest import Client, EngineFactory, forward_backward, optim_step
from tinker_core.engine import NewSession
from tinker_core.errors import (
    InvalidRequestError,
    InvalidTinkerPathError,
    UnknownBaseModelError,
    UnknownCheckpointError,
    UnknownSamplerError,
)
from tinker_core.types import (
    LOCAL_CALLER,
    LOCAL_OWNER,
    CreateSamplingSessionInput,
    LoadWeightsInput,
    LoadWeightsOutput,
    ModelInput,
    OptimStepOutput,
    RequestError,
    SampleInput,
    SampleOutput,
    SamplerSaveKind,
    SamplingParams,
    SaveWeightsForSamplerInput,
    SaveWeightsInput,
    SaveWeightsOutput,
)

PROMPT = ModelInput.from_ints([1, 2, 3, 4, 5])


async def open_sampler(client: Client, seq_id: int = 100, **target: str) -> str:
    request = CreateSamplingSessionInput(session_id=client.session_id, sampling_session_seq_id=seq_id, **target)
    return (await client.engine.create_sampling_session(request, LOCAL_OWNER)).sampling_session_id


async def logprobs(client: Client, sampler: str, seq_id: int) -> list[float]:
    request = SampleInput(
        sampling_session_id=sampler,
        seq_id=seq_id,
        prompt=PROMPT,
        prompt_logprobs=True,
        sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
    )
    output = await client.run(request)
    assert isinstance(output, SampleOutput), output
    assert output.prompt_logprobs is not None
    return [float(value) for value in output.prompt_logprobs.data[1:]]


async def train(client: Client, model_id: str, first_seq_id: int, num_steps: int = 3) -> int:
    for _ in range(num_steps):
        await client.run(forward_backward(model_id, first_seq_id))
        assert isinstance(await client.run(optim_step(model_id, first_seq_id + 1)), OptimStepOutput)
        first_seq_id += 2
    return first_seq_id


async def ephemeral(client: Client, model_id: str, seq_id: int, session_seq_id: int, **kwargs: Any) -> str:
    request = SaveWeightsForSamplerInput(
        model_id=model_id, seq_id=seq_id, sampling_session_seq_id=session_seq_id, **kwargs
    )
    output = await client.run(request)
    assert isinstance(output, SaveWeightsOutput), output
    assert output.sampling_session_id is not None
    return output.sampling_session_id


def test_old_samplers_keep_their_weights_whatever_is_trained_or_saved_later(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine(max_revisions=2) as client:
            model_id = await client.create()
            seq_id, before = 1, {}
            base = await open_sampler(client, base_model="tiny")
            for index in range(4):  # twice as many as the sampler holds at once
                seq_id = await train(client, model_id, seq_id)
                sampler = await ephemeral(client, model_id, seq_id, index)
                seq_id += 1
                before[sampler] = await logprobs(client, sampler, 0)
            assert len({tuple(values) for values in before.values()}) == 4
            for sampler, values in before.items():
                assert await logprobs(client, sampler, 1) == values
            assert await logprobs(client, base, 0) not in before.values()
            assert client.engine.metrics()[0].resident_revisions == 2

    asyncio.run(body())


def test_a_saved_sampler_path_works_after_its_model_is_gone_from_another_session(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            seq_id = await train(client, model_id, 1)
            live = await ephemeral(client, model_id, seq_id, 0)
            expected = await logprobs(client, live, 0)
            save = SaveWeightsForSamplerInput(model_id=model_id, seq_id=seq_id + 1, path="final")
            saved = await client.run(save)
            assert saved == SaveWeightsOutput(path=f"tinker://{model_id}/sampler_weights/final")
            await client.engine.finish_session(client.session_id, "success", None, LOCAL_OWNER)
            other = Client(client.engine, (await client.engine.create_session(NewSession())).session_id)
            assert isinstance(saved, SaveWeightsOutput)
            sampler = await open_sampler(other, model_path=saved.path or "")
            assert await logprobs(other, sampler, 0) == expected
            # The sampler keeps its weights also when their path is deleted.
            await other.engine.library.delete(saved.path or "", LOCAL_CALLER)
            assert await logprobs(other, sampler, 1) == expected
            with pytest.raises(UnknownCheckpointError):
                await open_sampler(other, 101, model_path=saved.path or "")

    asyncio.run(body())


def test_an_inflight_target_moves_with_the_next_inflight_save_and_snapshots_do_not(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            first = await ephemeral(client, model_id, 1, 0, kind=SamplerSaveKind.INFLIGHT)
            snapshot = await ephemeral(client, model_id, 2, 1)
            untrained = await logprobs(client, first, 0)
            seq_id = await train(client, model_id, 3)
            assert await logprobs(client, first, 1) == untrained
            second = await ephemeral(client, model_id, seq_id, 2, kind=SamplerSaveKind.INFLIGHT)
            trained = await logprobs(client, second, 0)
            assert trained != untrained
            assert await logprobs(client, first, 2) == trained
            assert await logprobs(client, snapshot, 0) == untrained
            assert client.engine.metrics()[0].resident_revisions == 2
            await client.engine.finish_session(client.session_id, "success", None, LOCAL_OWNER)
            assert client.engine.metrics()[0].resident_revisions == 0

    asyncio.run(body())


def test_a_repeated_ephemeral_save_returns_the_first_session(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            first = await ephemeral(client, model_id, 1, 0)
            assert await ephemeral(client, model_id, 1, 1) == first == f"{client.session_id}:sample:0"
            again = [await open_sampler(client, 7, base_model="tiny") for _ in range(2)]
            assert again[0] == again[1]

    asyncio.run(body())


def test_saved_state_continues_exactly_with_the_optimizer_and_fresh_without(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            seq_id = await train(client, model_id, 1)
            saved = await client.run(SaveWeightsInput(model_id=model_id, seq_id=seq_id, path="state"))
            assert isinstance(saved, SaveWeightsOutput)
            path = saved.path or ""
            with_optimizer, without = [
                LoadWeightsInput(path=path, optimizer=flag, session_id=client.session_id, model_seq_id=1 + index)
                for index, flag in enumerate((True, False))
            ]
            loaded = [await client.run(request) for request in (with_optimizer, without)]
            assert loaded[0] == LoadWeightsOutput(path=path, model_id=f"{client.session_id}:train:1")
            results = []
            for model, start in ((model_id, seq_id + 1), (f"{client.session_id}:train:1", 1)):
                end = await train(client, model, start)
                results.append(await client.run(forward_backward(model, end)))
            fresh = f"{client.session_id}:train:2"
            results.append(await client.run(forward_backward(fresh, await train(client, fresh, 1))))
            losses = [output.metrics["loss:sum"] for output in results]  # type: ignore[union-attr]
            assert losses[0] == losses[1] != losses[2]

    asyncio.run(body())


def test_wrong_names_paths_and_checkpoints_are_user_errors(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id, other = await client.create(0), await client.create(1, rank=8)
            requests = [
                SaveWeightsInput(model_id=model_id, seq_id=1, path="a/../b"),
                SaveWeightsInput(model_id=model_id, seq_id=2, path=".."),
                SaveWeightsInput(model_id=model_id, seq_id=3, path="ok"),
                SaveWeightsInput(model_id=model_id, seq_id=4, path="ok"),
                SaveWeightsInput(model_id=model_id, seq_id=5, path="ok", overwrite=True),
                SaveWeightsInput(model_id=model_id, seq_id=6, path="short", ttl_seconds=5),
                SaveWeightsForSamplerInput(model_id=model_id, seq_id=7, path="ok"),
            ]
            outputs = [await client.run(request) for request in requests]
            codes = [getattr(output, "code", "saved") for output in outputs]
            invalid = "InvalidRequestError"
            assert codes == [invalid, invalid, "saved", "CheckpointExistsError", "saved", invalid, "saved"]
            loads = {
                f"tinker://{model_id}/weights/ok": "CheckpointMismatchError",  # rank 4 into rank 8
                f"tinker://{model_id}/sampler_weights/ok": "CheckpointMismatchError",
                f"tinker://{model_id}/weights/none": "UnknownCheckpointError",
                "tinker://two/segments": "InvalidTinkerPathError",
                "https://elsewhere": "InvalidTinkerPathError",
            }
            for seq_id, (path, code) in enumerate(loads.items(), start=1):
                output = await client.run(LoadWeightsInput(model_id=other, seq_id=seq_id, path=path, optimizer=True))
                assert isinstance(output, RequestError)
                assert (output.code, output.category) == (code, "user")
            with pytest.raises(InvalidTinkerPathError):
                await open_sampler(client, model_path="tinker://x/../y")
            with pytest.raises(UnknownBaseModelError):
                await open_sampler(client, base_model="other")
            with pytest.raises(InvalidRequestError):
                await open_sampler(client)
            with pytest.raises(UnknownSamplerError):
                await logprobs(client, "s-unknown:sample:0", 0)

    asyncio.run(body())


def test_a_sample_is_accepted_once_and_its_seed_is_drawn_then(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            sampler = await open_sampler(client, base_model="tiny")
            request = SampleInput(
                sampling_session_id=sampler,
                seq_id=10**18,
                prompt=PROMPT,
                num_samples=3,
                sampling_params=SamplingParams(max_tokens=8),
            )
            receipts = [await client.engine.submit(request, LOCAL_CALLER) for _ in range(2)]
            assert receipts[0] == receipts[1]
            assert len(set(receipts[0].sample_sequence_ids or ())) == 3
            output = await client.result(receipts[0].request_id)
            assert isinstance(output, SampleOutput)
            assert len(output.sequences) == 3
            with pytest.raises(InvalidRequestError, match="num_samples"):
                await client.engine.submit(attrs.evolve(request, seq_id=5, num_samples=0), LOCAL_CALLER)

    asyncio.run(body())


def test_records_survive_a_restart_of_the_server(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            seq_id = await train(client, model_id, 1)
            saved = await client.run(SaveWeightsForSamplerInput(model_id=model_id, seq_id=seq_id, path="final"))
            expected = await logprobs(client, await open_sampler(client, model_path=saved.path), 0)  # type: ignore[union-attr]
        async with open_engine() as again:
            runs, total = await again.engine.training_runs(LOCAL_OWNER, 10, 0)
            assert (total, runs[0].model_id) == (1, model_id)
            _, checkpoints = await again.engine.library.run(model_id, LOCAL_OWNER)
            assert [str(checkpoint.path) for checkpoint in checkpoints] == [saved.path]  # type: ignore[union-attr]
            sampler = await open_sampler(again, model_path=str(checkpoints[0].path))
            assert await logprobs(again, sampler, 0) == expected

    asyncio.run(body())
