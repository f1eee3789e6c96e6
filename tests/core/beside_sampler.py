"""The fake sampler beside the workers, with a base model of its own, and with faults that a test can choose."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from typing import Any, Literal

import attrs

from tinker_core.errors import UnsupportedFeatureError
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import RankContext, Sampler, SamplerContext, SamplerPlugin
from tinker_core.testing.fake_sampler import FakeSampler
from tinker_core.testing.fakes import FakeHandle, FakeTrainer
from tinker_core.types import (
    Placement,
    PreparedSample,
    SampleOutput,
    SamplerCapabilities,
    Transport,
    WeightsRef,
)

Fault = Literal["base", "scale", "mlp", "together", "decode", "nan"]


@attrs.define(kw_only=True, eq=False)
class Beside:
    """A plugin; what it is told to do wrong counts for its samplers at once."""

    name: str = "beside"
    fault: Fault | None = None
    transports: tuple[Transport, ...] = (Transport.SHARED_MEMORY, Transport.FILE)
    prompt_logprobs: bool = True
    held: asyncio.Event | None = None
    """Samples with weights wait for it."""
    started: asyncio.Event = attrs.field(factory=asyncio.Event)
    """Set when such a sample has begun."""
    num_samples: int = 0
    resident: set[str] = attrs.field(factory=set)

    @hookimpl
    def tinker_register_sampler(self, register: Callable[[SamplerPlugin], None]) -> None:
        register(SamplerPlugin(name=self.name, placement=Placement.OWN, build=self._build))

    def _build(self, context: SamplerContext) -> Sampler:
        return _BesideSampler(self, context)


class _BesideSampler:
    def __init__(self, plugin: Beside, context: SamplerContext) -> None:
        self._plugin = plugin
        rank_context = RankContext(
            base_model=context.base_model,
            rank=0,
            world_size=1,
            rendezvous="",
            device=context.device,
            dtype=context.dtype,
            max_context_length=context.max_context_length,
            max_revisions=context.max_revisions,
        )
        trainer = FakeTrainer(rank_context)
        if plugin.fault == "base":
            trainer.base.unembed = trainer.base.unembed[::-1].copy()
        self._fake = FakeSampler(rank_context, FakeHandle(trainer))

    async def start(self) -> None:
        """It runs in this process."""

    def capabilities(self) -> SamplerCapabilities:
        return attrs.evolve(self._fake.capabilities(), transports=self._plugin.transports)

    async def publish(self, revision: str, ref: WeightsRef) -> None:
        if not self._plugin.transports:
            raise UnsupportedFeatureError("this sampler serves bare base models only")
        self._fake.publish(revision, ref)
        if ref.transport is Transport.SHARED_MEMORY:
            shutil.rmtree(str(ref.directory))
        adapter = self._fake._revisions[revision]
        lora = adapter.lora
        parts = (lora.train_attn, lora.train_mlp, lora.train_unembed)
        wrong = {
            "scale": True,
            "mlp": lora.train_mlp,
            "together": all(parts),
        }
        if wrong.get(self._plugin.fault or ""):
            adapter.lora = attrs.evolve(lora, alpha=2 * lora.alpha)
        self._plugin.resident.add(revision)

    async def save_revision(self, revision: str, directory: str) -> None:
        self._fake.capture_revision(revision)(directory)

    async def retire(self, revision: str) -> None:
        self._fake.retire(revision)
        self._plugin.resident.discard(revision)

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        plugin, asked = self._plugin, sample.request.prompt_logprobs
        plugin.num_samples += 1
        if asked and not plugin.prompt_logprobs:
            raise UnsupportedFeatureError("prompt_logprobs are not offered")
        if plugin.held is not None and sample.revision is not None:
            plugin.started.set()
            await plugin.held.wait()
        if plugin.fault == "decode" and not asked:
            sample = attrs.evolve(sample, revision=None)  # other weights than those that were asked for
        self._fake.submit(sample)
        while not (ended := [result for result in self._fake.step() if result.request_id == sample.request_id]):
            pass
        assert ended[0].output is not None, ended[0].error
        return self._spoilt(ended[0].output)

    def _spoilt(self, output: SampleOutput) -> SampleOutput:
        if self._plugin.fault != "nan":
            return output
        wrong: Any = [attrs.evolve(each, logprobs=(float("nan"),) * len(each.logprobs)) for each in output.sequences]
        return attrs.evolve(output, sequences=tuple(wrong))

    async def is_waiting(self, request_id: str) -> bool:
        del request_id
        return False

    async def close(self) -> None:
        """Nothing to stop."""
