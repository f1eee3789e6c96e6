"""The sampler ``vllm`` as the server's engine sees it: any number of vLLM engines behind one door."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tinker_core.errors import UnsupportedFeatureError, WorkerLostError
from tinker_core.types import PreparedSample, SampleOutput, SamplerCapabilities, WeightsRef
from tinker_sampler_vllm.keeper import EngineKeeper
from tinker_sampler_vllm.links.link import EngineLink
from tinker_sampler_vllm.links.plain import ONLY_BASE_MODELS
from tinker_sampler_vllm.routing import Router
from tinker_sampler_vllm.weights import HeldWeights

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""How often engines may die under one sample before it fails: it may be what kills them."""


class VllmSampler:
    """Implements `tinker_core.interfaces.Sampler`.

    Weights are kept in this machine's memory for as long as they are published, so that an engine that dies loses
    nothing: another is given them again, and the samples that it had run again. Their seeds are fixed, so nobody can
    tell.
    """

    def __init__(self, keepers: list[EngineKeeper], weights_directory: Path, batch_size: int = 64) -> None:
        """``batch_size``: sequences that an engine decodes together."""
        self._keepers = keepers
        self._router = Router(keepers, batch_size)
        self._weights = HeldWeights(weights_directory)
        self._capabilities: SamplerCapabilities
        self._one_by_one = asyncio.Lock()
        self._running: dict[str, tuple[EngineKeeper, EngineLink] | None] = {}
        """Where each sample is; None while it waits for an engine."""

    async def start(self) -> None:
        """Start all engines; raises why one does not start."""
        await asyncio.to_thread(self._weights.open)
        results = await asyncio.gather(*(keeper.start() for keeper in self._keepers), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            await self.close()
            raise failures[0]
        log.info("samples are run by %s", ", ".join(keeper.name for keeper in self._keepers))
        # Plain servers limit nothing that another engine can do; what they cannot, the router knows of each sample.
        takers = [keeper for keeper in self._keepers if keeper.takes_weights]
        if not takers:
            log.warning("plain vLLM servers serve bare base models: models can be trained here, and not sampled from")
        links = [keeper.link for keeper in takers or self._keepers]
        self._capabilities = common_capabilities([link.description.capabilities for link in links if link is not None])

    def capabilities(self) -> SamplerCapabilities:
        """What all engines offer."""
        return self._capabilities

    async def publish(self, revision: str, ref: WeightsRef) -> None:
        """Keep weights and give them to the engines that run; raises their refusal, and then keeps nothing."""
        if revision in self._weights:
            return
        takers = [keeper for keeper in self._keepers if keeper.takes_weights]
        if not takers:
            raise UnsupportedFeatureError(ONLY_BASE_MODELS)
        await asyncio.to_thread(self._weights.take, revision, ref)
        try:
            await asyncio.gather(*(self._give(keeper, revision) for keeper in takers))
        except BaseException:
            await self.retire(revision)
            raise

    async def _give(self, keeper: EngineKeeper, revision: str) -> None:
        link = keeper.link
        if link is None:
            return  # it is given them when a sample needs them
        try:
            await self._ensure(keeper, link, revision)
        except WorkerLostError as error:
            log.warning("%s was lost while it took %s: %s", keeper.name, revision, error)

    async def _ensure(self, keeper: EngineKeeper, link: EngineLink, revision: str) -> None:
        if not keeper.has(link, revision):
            await keeper.ensure(link, self._weights.call(revision))

    async def save_revision(self, revision: str, directory: str) -> None:
        """Copy what is kept."""
        await asyncio.to_thread(self._weights.save, revision, Path(directory))

    async def retire(self, revision: str) -> None:
        """Take weights away from all engines."""
        await asyncio.gather(*(keeper.retire(revision) for keeper in self._keepers))
        await asyncio.to_thread(self._weights.forget, revision)

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        """Generate, on another engine when one dies."""
        deaths = 0
        self._running[sample.request_id] = None
        try:
            while True:
                try:
                    async with self._turn(deaths):
                        return await self._attempt(sample)
                except WorkerLostError as error:
                    deaths += 1
                    if deaths >= MAX_DEATHS:
                        message = f"engines died {deaths} times under this sample, it is given up: {error}"
                        raise WorkerLostError(message) from error
                    log.warning("sample %s runs again: %s", sample.request_id, error)
        finally:
            del self._running[sample.request_id]

    @asynccontextmanager
    async def _turn(self, deaths: int) -> AsyncIterator[None]:
        """One at a time of those under which engines have died more than once.

        So the samples that only ran beside one that kills its engine do not share its fate.
        """
        if deaths < MAX_DEATHS - 1:
            yield
            return
        async with self._one_by_one:
            yield

    async def _attempt(self, sample: PreparedSample) -> SampleOutput:
        session = sample.request.sampling_session_id
        async with self._router.place(session, sample) as (keeper, link):
            if sample.revision is not None:
                self._weights.directory(sample.revision)  # raises for one that is not there
                await self._ensure(keeper, link, sample.revision)
            self._running[sample.request_id] = keeper, link
            try:
                return await link.sample(sample)
            finally:
                self._running[sample.request_id] = None

    async def is_waiting(self, request_id: str) -> bool:
        """Whether a sample in progress has not begun."""
        if request_id not in self._running:
            return False
        place = self._running[request_id]
        if place is None:
            return True
        try:
            return await place[1].is_waiting(request_id)
        except WorkerLostError:
            return True

    async def close(self) -> None:
        """Stop the engines."""
        await asyncio.gather(*(keeper.close() for keeper in self._keepers))
        await asyncio.to_thread(self._weights.close)


def common_capabilities(each: list[SamplerCapabilities]) -> SamplerCapabilities:
    """What every one of several engines offers."""
    first, *rest = each
    for other in rest:
        first = SamplerCapabilities(
            max_context_length=min(first.max_context_length, other.max_context_length),
            vocab_size=min(first.vocab_size, other.vocab_size),
            transports=tuple(t for t in first.transports if t in other.transports),
            max_revisions=min(first.max_revisions, other.max_revisions),
            max_topk=min(first.max_topk, other.max_topk),
            max_lora_rank=_least(first.max_lora_rank, other.max_lora_rank),
            lora_targets=_shared(first.lora_targets, other.lora_targets),
        )
    return first


def _least(first: int | None, second: int | None) -> int | None:
    given = [rank for rank in (first, second) if rank is not None]
    return min(given, default=None)


def _shared(first: tuple[str, ...] | None, second: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if first is None or second is None:
        return second if first is None else first
    return tuple(sorted(set(first) & set(second)))
