"""Measures trainer and sampler on the same tokens: on given ones, bare and with an adapter, and on sampled ones."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinker_core.engine.agreement import (
    ADAPTER,
    BASE,
    DECODE,
    PARTS,
    Findings,
    Logprobs,
    mean_change,
)
from tinker_core.engine.handoff import Handoff
from tinker_core.engine.interruption import to_its_end
from tinker_core.engine.live_weights import best_transport, export_weights, live_weights
from tinker_core.engine.revisions import Revisions
from tinker_core.errors import ConfigurationError, UnsupportedFeatureError, UserError, WorkerLostError
from tinker_core.executors.protocol import ModelName
from tinker_core.interfaces import Sampler, WorkerGroup
from tinker_core.types import (
    AdamParams,
    Datum,
    LoraConfig,
    ModelInput,
    OptimizerConfig,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedOptimStep,
    PreparedSample,
    RequestError,
    SampleInput,
    SampleOutput,
    SamplingParams,
    StopCondition,
    TensorData,
    TrainerCapabilities,
    Transport,
)

Tokens = npt.NDArray[np.int64]

LOSS, OPTIMIZER = "cross_entropy", "adamw"
LEAST_CONTEXT = 4
"""Tokens of context without which there is nothing to compare."""
_MODEL_ID = "agreement:train:0"
"""Made by no session, so that whatever a crash leaves of it is swept as that of a finished one is."""
_NUM_TEXTS, _NUM_GIVEN, _NUM_SAMPLED, _NUM_SAMPLES = 3, 16, 8, 2
"""Few, because a start waits for them, and enough that a mean of them means something."""
_RANK = 4
_MAX_STEPS = 16
_LEARNING_RATE = 0.01
_FULL_LEARNING_RATE = 1e-4
"""Of the first step where all parameters are trained, which a larger one could break; it doubles with every step."""


@attrs.frozen(kw_only=True)
class Pair:
    """A trainer and a sampler that run, and what lies between them."""

    group: WorkerGroup
    trainer: TrainerCapabilities
    sampler: Sampler
    revisions: Revisions
    handoff: Handoff | None

    @property
    def context_length(self) -> int:
        """Tokens that both take."""
        return min(self.trainer.max_context_length, self.sampler.capabilities().max_context_length)

    @property
    def transport(self) -> Transport | None:
        """How a client's weights go from the one to the other, by a named save if there is no better way."""
        sampler = self.sampler.capabilities()
        by_file = Transport.FILE in sampler.transports and Transport.FILE in self.trainer.transports
        return best_transport(self.trainer, sampler) or (Transport.FILE if by_file else None)


async def compare(pair: Pair, findings: Findings) -> None:
    """Compare in steps, as far as it takes to know what to suspect.

    Raises what trainer or sampler raise, `WorkerLostError` among it. Leaves no model and no weights behind.
    """
    probe = _Probe(pair, findings)
    lora = _adapter_config(pair, PARTS) if pair.transport is not None else None
    if lora is None:
        findings.notes.append("adapters were not compared: the sampler takes none from this trainer")
        await probe.compare_bare()
    elif not await probe.compare_adapter(ADAPTER, lora) and lora.rank > 0:
        await probe.compare_parts()


class _Probe:
    def __init__(self, pair: Pair, findings: Findings) -> None:
        self._pair = pair
        self._findings = findings
        self._gives_prompt_logprobs = True
        vocab_size = min(pair.trainer.vocab_size, pair.sampler.capabilities().vocab_size)
        self._num_sampled = min(_NUM_SAMPLED, pair.context_length // 2)
        num_given = min(_NUM_GIVEN, pair.context_length - self._num_sampled)
        self._texts: list[Tokens] = list(np.random.default_rng(0).integers(0, vocab_size, (_NUM_TEXTS, num_given)))

    async def compare_bare(self) -> None:
        """The base model alone: given tokens, and sampled ones if those agree."""
        rank = 0 if self._pair.trainer.full_parameter else 1  # its B is zero
        async with self._model(LoraConfig(rank=rank, seed=0)) as model:
            if await self._compare_given(BASE, await model.logprobs(self._texts), None):
                await self._compare_decode(model, None)

    async def compare_adapter(self, name: str, lora: LoraConfig) -> bool:
        """An adapter: False if the base model agrees on given tokens, and the base model with it does not.

        Of rank 0 it is all parameters.
        """
        async with self._model(lora) as model:
            before = await model.logprobs(self._texts, gradient=True)
            if name == ADAPTER and not await self._compare_given(BASE, before, None):
                return True
            after = await self._train(name, model, before)
            async with self._published() as revision:
                if not await self._compare_given(name, after, revision):
                    return False
                if name == ADAPTER:
                    await self._compare_decode(model, revision)
        return True

    async def _compare_given(self, name: str, trained: list[Logprobs], revision: str | None) -> bool:
        """Whether given tokens agree, or cannot be compared."""
        sampled = await self._prompt_logprobs(revision)
        return sampled is None or self._findings.note(name, trained, sampled)

    async def compare_parts(self) -> None:
        """Say of each part of an adapter whether it agrees alone."""
        for part in PARTS:
            lora = _adapter_config(self._pair, [part])
            if lora is None:
                continue
            try:
                await self.compare_adapter(part, lora)
            except UserError as error:
                self._findings.notes.append(f"{part} alone was not compared: {error}")

    # --- the trainer's side -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _model(self, lora: LoraConfig) -> AsyncIterator[_ProbeModel]:
        group = self._pair.group
        config = OptimizerConfig(type=OPTIMIZER)
        try:
            await group.call("create", PreparedModel(model_id=_MODEL_ID, lora_config=lora, optimizer_config=config))
            yield _ProbeModel(group)
        finally:
            with contextlib.suppress(WorkerLostError):  # it went with its process
                await to_its_end(group.call("unload", ModelName(model_id=_MODEL_ID)))

    async def _train(self, name: str, model: _ProbeModel, before: list[Logprobs]) -> list[Logprobs]:
        """Take steps until the adapter says something else than the base model, whose gradient is there; what it says
        then."""
        change = 0.0
        for count in range(_MAX_STEPS):
            full = min(_LEARNING_RATE, _FULL_LEARNING_RATE * 2**count)
            await model.step(full if self._pair.trainer.full_parameter else _LEARNING_RATE)
            now = await model.logprobs(self._texts, gradient=True)
            change = mean_change(before, now)
            if change >= self._findings.telling_change:
                return now
        self._findings.notes.append(f"{name}: the adapter that was compared changes logprobs by {change:.2g} nats only")
        return now

    # --- the sampler's side -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _published(self) -> AsyncIterator[str]:
        """The probe's present weights in the sampler, on the way of any client's."""
        pair, revision = self._pair, f"{_MODEL_ID}@{uuid.uuid4().hex}"
        transport = pair.transport
        assert transport is not None
        export = partial(export_weights, pair.group, _MODEL_ID)
        try:
            if transport is Transport.FILE:
                pair.revisions.add_saved(revision, _Exported(pair.group))
            else:
                await pair.revisions.publish_live(
                    revision, export, partial(live_weights, pair.group, _MODEL_ID, transport, pair.handoff)
                )
            async with pair.revisions.use(revision):
                yield revision
        finally:
            await to_its_end(pair.revisions.drop(revision))

    async def _prompt_logprobs(self, revision: str | None) -> list[Logprobs] | None:
        """Of all but the first token of each text, all texts at once; None where the sampler does not offer it."""
        if not self._gives_prompt_logprobs:
            return None
        params = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
        try:
            outputs = await self._sample(revision, params, prompt_logprobs=True)
        except UnsupportedFeatureError as error:
            outputs = []
            self._findings.notes.append(f"given tokens were not compared: {error}")
        self._gives_prompt_logprobs = bool(outputs)
        return (
            [_of_prompt(text, output) for text, output in zip(self._texts, outputs, strict=True)] if outputs else None
        )

    async def _compare_decode(self, model: _ProbeModel, revision: str | None) -> None:
        params = SamplingParams(max_tokens=self._num_sampled, temperature=1.0, seed=0, stop=StopCondition(at_eos=False))
        outputs = await self._sample(revision, params, num_samples=_NUM_SAMPLES)
        texts, theirs = [], []
        for text, output in zip(self._texts, outputs, strict=True):
            for sequence in output.sequences:
                if not sequence.tokens or len(sequence.tokens) != len(sequence.logprobs):
                    raise ConfigurationError(
                        f"the sampler gave {len(sequence.logprobs)} logprobs of {len(sequence.tokens)} sampled tokens"
                    )
                texts.append(np.concatenate([text, np.array(sequence.tokens, np.int64)]))
                theirs.append(np.array(sequence.logprobs))
        ours = await model.logprobs(texts)
        ours = [whole[whole.size - part.size :] for whole, part in zip(ours, theirs, strict=True)]
        self._findings.note(DECODE, ours, theirs)

    async def _sample(self, revision: str | None, params: SamplingParams, **asked: Any) -> list[SampleOutput]:  # noqa: ANN401
        """One sample of each text, all at once, and each in a session of its own: several engines may share them."""
        check = uuid.uuid4().hex
        samples = [
            PreparedSample(
                request_id=f"agreement-{check}-{index}",
                revision=revision,
                request=SampleInput(
                    sampling_session_id=f"agreement-{index}",
                    seq_id=0,
                    prompt=ModelInput.from_ints(text),
                    sampling_params=params,
                    **asked,
                ),
            )
            for index, text in enumerate(self._texts)
        ]
        tasks = [asyncio.create_task(self._pair.sampler.sample(sample)) for sample in samples]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _ProbeModel:
    """A model in the trainer that no client knows."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

    async def logprobs(self, texts: Sequence[Tokens], *, gradient: bool = False) -> list[Logprobs]:
        """Of all but the first token of each text."""
        request = PreparedModelPass(
            request_id=_MODEL_ID,
            model_id=_MODEL_ID,
            data=tuple(_datum(text) for text in texts),
            loss_fn=LOSS,
            forward_only=not gradient,
        )
        (result,) = await self._group.call("forward_backward", PreparedModelPassBatch(requests=(request,)))
        _require(result.error)
        return [output["logprobs"].to_numpy() for output in result.output.loss_fn_outputs]

    async def step(self, learning_rate: float) -> None:
        params = AdamParams(learning_rate=learning_rate, eps=1e-8)
        step = PreparedOptimStep(request_id=_MODEL_ID, model_id=_MODEL_ID, adam_params=params)
        (result,) = await self._group.call("optim_step", (step,))
        _require(result.error)


@attrs.frozen
class _Exported:
    """The probe's weights as files, for a sampler that takes nothing else."""

    group: WorkerGroup

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Path]:
        directory = await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="tinker-agreement-")
        try:
            await export_weights(self.group, _MODEL_ID, Path(directory.name))
            yield Path(directory.name)
        finally:
            await asyncio.to_thread(directory.cleanup)

    async def is_there(self) -> bool:
        return True


def _adapter_config(pair: Pair, parts: Iterable[str]) -> LoraConfig | None:
    """A small adapter with some parts, as far as the sampler serves them; None when it serves none of them.

    Where all parameters are trained it is those, in place of an adapter with all parts.
    """
    if pair.trainer.full_parameter:
        return LoraConfig(rank=0, seed=0)
    sampler = pair.sampler.capabilities()
    bounds = [_RANK, pair.trainer.max_lora_rank, *([] if sampler.max_lora_rank is None else [sampler.max_lora_rank])]
    served = sampler.lora_targets
    chosen = [part for part in parts if served is None or set(PARTS[part]) <= set(served)]
    if not chosen or min(bounds) < 1:
        return None
    return LoraConfig(
        rank=min(bounds),
        seed=0,
        train_attn="attention" in chosen,
        train_mlp="mlp" in chosen,
        train_unembed="unembed" in chosen,
    )


def _datum(text: Tokens) -> Datum:
    return Datum(
        model_input=ModelInput.from_ints(text[:-1]),
        loss_fn_inputs={"target_tokens": TensorData.from_numpy(text[1:])},
    )


def _of_prompt(text: Tokens, output: SampleOutput) -> Logprobs:
    given = output.prompt_logprobs
    if given is None or given.data.size != text.size:
        raise ConfigurationError(
            f"the sampler was asked for the logprobs of a prompt of {text.size} tokens and gave "
            f"{'none' if given is None else given.data.size}"
        )
    return given.data[1:]


def _require(error: RequestError | None) -> None:
    if error is not None:
        raise ConfigurationError(f"the trainer cannot be compared with the sampler: {error.message}")
