"""A sampler beside the engine that finishes a sample when a test says so, and dies with its base model's workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import attrs

from tinker_core.errors import WorkerLostError
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import Sampler, SamplerContext, SamplerPlugin
from tinker_core.types import (
    GeneratedSequence,
    Placement,
    PreparedSample,
    SampleOutput,
    SamplerCapabilities,
    StopReason,
    Transport,
    WeightsRef,
)


class Gate:
    """A plugin whose samplers hold all samples until they are let through."""

    def __init__(self, slots: int = 8, **capabilities: Any) -> None:
        self.slots = slots
        self.capabilities = capabilities
        self.started: asyncio.Queue[PreparedSample] = asyncio.Queue()
        """Samples that have a slot, in order."""
        self.let_through: dict[str, asyncio.Event] = {}
        """By prompt token: samples with the same first token go together."""
        self.cancelled: list[str] = []
        self.num_samplers = 0

    @hookimpl
    def tinker_register_sampler(self, register: Callable[[SamplerPlugin], None]) -> None:
        register(SamplerPlugin(name="gate", placement=Placement.OWN, build=self.build))

    def build(self, context: SamplerContext) -> Sampler:
        del context
        return self.new_sampler()

    def new_sampler(self) -> Sampler:
        """A sampler that has not started."""
        self.num_samplers += 1
        return _GateSampler(self)

    def opened(self, first_token: int) -> asyncio.Event:
        """The event that lets samples with this first prompt token through."""
        return self.let_through.setdefault(str(first_token), asyncio.Event())


@attrs.define(eq=False)
class _GateSampler:
    gate: Gate
    died: asyncio.Event = attrs.field(factory=asyncio.Event)
    waiting: set[str] = attrs.field(factory=set)
    free: asyncio.Semaphore = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.free = asyncio.Semaphore(self.gate.slots)

    async def start(self) -> None:
        """It runs already."""

    def capabilities(self) -> SamplerCapabilities:
        return SamplerCapabilities(
            max_context_length=64,
            vocab_size=64,
            transports=(Transport.FILE,),
            max_revisions=4,
            **self.gate.capabilities,
        )

    async def publish(self, revision: str, ref: WeightsRef) -> None:
        del revision, ref

    async def save_revision(self, revision: str, directory: str) -> None:
        del revision, directory

    async def retire(self, revision: str) -> None:
        del revision

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        first = int(sample.request.prompt.text_tokens()[0])
        if first != 0:  # 0 is the probe of a start
            await self._pass_gate(sample, self.gate.opened(first))
        sequence = GeneratedSequence(stop_reason=StopReason.STOP, tokens=(first,), logprobs=(0.0,))
        return SampleOutput(sequences=(sequence,) * sample.request.num_samples)

    async def _pass_gate(self, sample: PreparedSample, opened: asyncio.Event) -> None:
        passing = asyncio.create_task(self._take_slot(sample, opened))
        dying = asyncio.create_task(self.died.wait())
        try:
            await asyncio.wait([passing, dying], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.gate.cancelled.append(sample.request_id)
            raise
        finally:
            passing.cancel()
            dying.cancel()
            await asyncio.gather(passing, dying, return_exceptions=True)
        if self.died.is_set():
            raise WorkerLostError("the sampler is gone")

    async def _take_slot(self, sample: PreparedSample, opened: asyncio.Event) -> None:
        self.waiting.add(sample.request_id)
        try:
            async with self.free:
                self.waiting.discard(sample.request_id)
                self.gate.started.put_nowait(sample)
                await opened.wait()
        finally:
            self.waiting.discard(sample.request_id)

    async def is_waiting(self, request_id: str) -> bool:
        return request_id in self.waiting

    async def close(self) -> None:
        self.died.set()
