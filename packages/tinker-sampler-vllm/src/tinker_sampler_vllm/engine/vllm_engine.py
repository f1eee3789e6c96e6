"""One vLLM engine: adapters and full weights under immutable names, and samples from them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

from tinker_core.encoding import Encoder
from tinker_core.errors import (
    CapacityError,
    CheckpointMismatchError,
    ConfigurationError,
    NonFiniteError,
    UnknownCheckpointError,
    WorkerLostError,
)
from tinker_core.sampling.stopping import StopRules
from tinker_core.training.peft_format import WEIGHTS_FILE
from tinker_core.types import GeneratedSequence, PreparedSample, SampleOutput, SamplerCapabilities, Transport
from tinker_sampler_vllm.engine.arguments import engine_arguments
from tinker_sampler_vllm.engine.full_weights import ORIGINAL, FullWeights
from tinker_sampler_vllm.engine.requests import CheckedSample, SequenceBuilder, check_sample, vllm_params
from tinker_sampler_vllm.engine.scores import PromptAnswers
from tinker_sampler_vllm.engine.weight_files import StoredTensor, base_tensors, check_adapter, stored_tensors
from tinker_sampler_vllm.protocol import EngineSettings

log = logging.getLogger(__name__)


class VllmEngine:
    """Drives vLLM's ``AsyncLLM``; an instance lives on the event loop that started it."""

    def __init__(
        self,
        llm: Any,  # noqa: ANN401 - vLLM is not typed
        settings: EngineSettings,
        capabilities: SamplerCapabilities,
        eos: frozenset[int],
        base: dict[str, StoredTensor],
        *,
        ties_head: bool,
    ) -> None:
        self._llm = llm
        self._settings = settings
        self.capabilities = capabilities
        self._stop_rules = StopRules(settings.base_model.path, eos, capabilities.vocab_size)
        self._encoder = Encoder()
        self._ids = itertools.count(1)
        self._adapters: dict[str, int] = {}
        """vLLM's number of each adapter; no number is used twice."""
        self._full: dict[str, int] = {}
        """The number of each full revision."""
        self._base = base
        self._full_weights = FullWeights(llm, base, ties=ties_head)
        self._users: dict[str, set[str]] = {}
        """Samples in progress by revision: weights that are retired leave with the last of them."""
        self._retired: set[str] = set()
        self._loading = asyncio.Lock()
        self._sequences: dict[str, tuple[str, ...]] = {}
        """vLLM's request ids by sample; none yet for one that waits for its weights."""

    @classmethod
    async def start(cls, settings: EngineSettings) -> Self:
        """Start a vLLM engine; raises `ConfigurationError` when vLLM cannot serve the model."""
        from vllm.v1.engine.async_llm import AsyncLLM

        llm = AsyncLLM.from_engine_args(engine_arguments(settings))
        try:
            (worker, *_) = await llm.collective_rpc("tinker_prepare")
            if settings.device == "cpu" and not worker["cpu_lora_mended"]:
                raise ConfigurationError(
                    "the fix of vLLM's LoRA on CPUs is not in place; is VLLM_PLUGINS set without 'tinker'?"
                )
            config = llm.vllm_config.model_config
            capabilities = SamplerCapabilities(
                max_context_length=config.max_model_len,
                vocab_size=config.get_vocab_size(),
                transports=(Transport.SHARED_MEMORY, Transport.FILE),
                max_revisions=settings.max_revisions,
                max_lora_rank=settings.max_lora_rank,
                lora_targets=tuple(worker["lora_targets"]),
            )
            base = await asyncio.to_thread(base_tensors, settings.base_model.path)
            return cls(llm, settings, capabilities, _eos_tokens(config), base, ties_head=worker["ties_head"])
        except BaseException:
            llm.shutdown()
            raise

    # --- weights ------------------------------------------------------------------------------------------------------

    async def load(self, revision: str, directory: str) -> None:
        """Take an adapter out of a PEFT directory; a name that is there already keeps its weights.

        Raises `CapacityError` or `CheckpointMismatchError`.
        """
        async with self._loading:
            if self._is_new(revision):
                tensors = await asyncio.to_thread(stored_tensors, [Path(directory) / WEIGHTS_FILE])
                check_adapter(tensors, self._base, max_rank=self._settings.max_lora_rank)
                number = next(self._ids)
                # vLLM dies with an adapter that it cannot load when a request brings it, not when it is told before.
                for failure in await self._llm.collective_rpc("tinker_load_adapter", args=(number, directory)):
                    if failure:
                        await self._llm.collective_rpc("tinker_drop_adapter", args=(number,))
                        raise CheckpointMismatchError(f"vLLM cannot serve the adapter: {failure}")
                self._adapters[revision] = number

    async def load_full(self, revision: str, directory: str) -> None:
        """Take all weights of a model out of safetensors files; a name that is there already keeps its weights.

        They are put into the device when a sample needs them, in place of those that are in it; the directory is not
        needed any more once this returns, but its files take room until the revision is retired.

        Raises `CapacityError` or `CheckpointMismatchError`.
        """
        async with self._loading:
            if self._is_new(revision):
                number = next(self._ids)
                await self._full_weights.load(number, directory)
                self._full[revision] = number

    def _is_new(self, revision: str) -> bool:
        """Whether a name is to be loaded; raises `CapacityError` when there is no place for it."""
        if revision in self._adapters or revision in self._full:
            self._retired.discard(revision)
            return False
        held = len(self._adapters) + len(self._full)
        if held >= self.capabilities.max_revisions:
            raise CapacityError(f"the engine holds {held} revisions already; retire one")
        return True

    async def retire(self, revision: str) -> None:
        """Forget a revision once the samples in progress from it have ended; unknown names are ignored."""
        if revision in self._adapters or revision in self._full:
            self._retired.add(revision)
            await self._forget_unused(revision)

    async def _forget_unused(self, revision: str) -> None:
        async with self._loading:
            if revision not in self._retired or self._users.get(revision):
                return
            self._retired.discard(revision)
            self._users.pop(revision, None)
            if revision in self._full:
                await self._full_weights.drop(self._full.pop(revision))
            else:
                await self._llm.collective_rpc("tinker_drop_adapter", args=(self._adapters.pop(revision),))

    async def retire_all(self) -> None:
        """Forget all revisions; no sample may be in progress."""
        for revision in [*self._adapters, *self._full]:
            await self.retire(revision)

    # --- samples ------------------------------------------------------------------------------------------------------

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        """Generate; raises the request's own error, or `WorkerLostError` when vLLM has died."""
        from vllm.v1.engine.exceptions import EngineDeadError

        checked = check_sample(sample, self.capabilities, self._stop_rules)
        revision = sample.revision
        if revision is not None and (
            revision in self._retired or not (revision in self._adapters or revision in self._full)
        ):
            raise UnknownCheckpointError(revision)
        if revision is not None:
            self._users.setdefault(revision, set()).add(sample.request_id)
        self._sequences[sample.request_id] = ()
        try:
            # Adapters belong to the base model's own weights.
            async with self._full_weights.using(ORIGINAL if revision is None else self._full.get(revision, ORIGINAL)):
                return await self._generate(checked)
        except EngineDeadError as error:
            raise WorkerLostError(f"vLLM has died: {error}") from error
        finally:
            self._sequences.pop(sample.request_id, None)
            if revision is not None:
                self._users[revision].discard(sample.request_id)
                if revision in self._retired:
                    await self._forget_unused(revision)

    async def _generate(self, checked: CheckedSample) -> SampleOutput:
        sample = checked.sample
        ids = tuple(f"{sample.request_id}.{index}.{next(self._ids)}" for index in range(sample.request.num_samples))
        self._sequences[sample.request_id] = ids
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._sequence(checked, index, request_id))
                    for index, request_id in enumerate(ids)
                ]
        except BaseExceptionGroup as errors:
            await self._discard_answers(checked, ids[0])
            raise errors.exceptions[0] from None  # they all have the same cause
        except asyncio.CancelledError:
            await asyncio.shield(self._discard_answers(checked, ids[0]))
            raise
        sequences, cached = zip(*(task.result() for task in tasks), strict=True)
        answers = await self._answers(checked, ids[0])
        return SampleOutput(
            sequences=sequences,
            prompt_logprobs=answers.prompt_logprobs,
            topk_prompt_logprobs=answers.topk_prompt_logprobs,
            target_prompt_logprobs=answers.target_prompt_logprobs,
            prompt_alt_tokens=answers.prompt_alt_tokens,
            prompt_cache_hit_tokens=cached[0],
        )

    async def _sequence(self, checked: CheckedSample, index: int, request_id: str) -> tuple[GeneratedSequence, int]:
        """One continuation, and how many tokens of its prompt were cached."""
        from vllm import TokensPrompt
        from vllm.lora.request import LoRARequest

        revision = checked.sample.revision
        adapter = None
        if revision in self._adapters:
            # The name is part of the key of the prefix cache, so whatever is loaded has a cache of its own.
            number = self._adapters[revision]
            adapter = LoRARequest(f"{revision} ({number})", number, f"memory:{number}")
        stream: AsyncIterator[Any] = self._llm.generate(
            TokensPrompt(prompt_token_ids=checked.prompt),
            vllm_params(checked, index, request_id, self._encoder),
            request_id,
            lora_request=adapter,
        )
        builder, cached = SequenceBuilder(checked), 0
        async for output in stream:
            cached = output.num_cached_tokens or cached
            builder.add(output.outputs[0])
            if builder.stopped:
                break
        await stream.aclose()  # type: ignore[attr-defined]  # frees the place of a sequence that a stop text ended
        return builder.finish(), cached

    async def _answers(self, checked: CheckedSample, key: str) -> PromptAnswers:
        if not checked.asks_about_prompt:
            return PromptAnswers()
        encoded = await self._take(key)
        answers: PromptAnswers = self._encoder.decode(encoded, PromptAnswers)
        if not answers.finite:
            raise NonFiniteError("the logits of the prompt are not finite; the model or its adapter has diverged")
        return answers

    async def _discard_answers(self, checked: CheckedSample, key: str) -> None:
        if checked.asks_about_prompt and not self._llm.errored:
            await self._take(key, may_miss=True)

    async def _take(self, key: str, *, may_miss: bool = False) -> bytes:
        for encoded in await self._llm.collective_rpc("tinker_take_scores", args=(key,)):
            if encoded:
                return bytes(encoded)
        if not may_miss:
            raise RuntimeError(f"no worker has computed what {key} asks about its prompt")
        return b""

    def is_waiting(self, sample_id: str) -> bool:
        """Whether a sample has produced nothing yet, for want of a place in the batch; False for unknown ones."""
        if sample_id not in self._sequences:
            return False
        external_ids = self._sequences[sample_id]
        if not external_ids:
            return True
        processor = self._llm.output_processor
        states = [
            processor.request_states[internal]
            for external in external_ids
            for internal in processor.external_req_ids.get(external, ())
            if internal in processor.request_states
        ]
        return bool(states) and all(state.is_prefilling for state in states)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Raise `WorkerLostError` when vLLM has died, or its weights are not known any more."""
        if self._llm.errored:
            raise WorkerLostError("vLLM has died")
        if self._full_weights.failure is not None:
            raise WorkerLostError(self._full_weights.failure)

    async def wait_dead(self) -> None:
        """Return as soon as vLLM has died, or its weights are not known any more."""
        self._llm._run_output_handler()
        failed = asyncio.create_task(self._full_weights.wait_failed())
        try:
            await asyncio.wait([self._llm.output_handler, failed], return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                log.error("%s", failed.result())
        finally:
            failed.cancel()

    def close(self) -> None:
        """Stop vLLM."""
        self._llm.shutdown()


def _eos_tokens(config: Any) -> frozenset[int]:  # noqa: ANN401 - vLLM's ModelConfig
    from tinker_core.sampling.stopping import eos_tokens_of

    return eos_tokens_of(config.model, config.hf_text_config)
