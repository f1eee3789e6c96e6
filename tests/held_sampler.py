"""A sampler in the server's own process that holds samples until a test lets them go, with as many slots as it says."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from typing import Any

from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import SamplerPlugin
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

HOLD = 63
"""Samples whose prompt begins with this token wait to be released; all others end at once."""
PATIENCE = 120.0
"""Seconds after which a test gives up waiting."""


class HeldSampler:
    """A plugin, and the one sampler that it builds."""

    def __init__(self, slots: int = 1) -> None:
        self.started: queue.Queue[str] = queue.Queue()
        """Request ids of held samples that have a slot."""
        self.cancelled: queue.Queue[str] = queue.Queue()
        self._num_slots = slots
        self._waiting: set[str] = set()

    @hookimpl
    def tinker_register_sampler(self, register: Callable[[SamplerPlugin], None]) -> None:
        register(SamplerPlugin(name="held", placement=Placement.OWN, build=lambda _: self))

    def wait_started(self) -> str:
        return self.started.get(timeout=PATIENCE)

    def wait_cancelled(self) -> str:
        return self.cancelled.get(timeout=PATIENCE)

    def release(self) -> None:
        """Let go whatever is held, and hold nothing from now on."""
        self._loop.call_soon_threadsafe(self._released.set)

    # --- a sampler ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._released = asyncio.Event()
        self._slots = asyncio.Semaphore(self._num_slots)

    def capabilities(self) -> SamplerCapabilities:
        return SamplerCapabilities(max_context_length=64, vocab_size=64, transports=(Transport.FILE,), max_revisions=4)

    async def publish(self, revision: str, ref: WeightsRef) -> None:
        del revision, ref

    async def save_revision(self, revision: str, directory: str) -> None:
        del revision, directory

    async def retire(self, revision: str) -> None:
        del revision

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        if sample.request.prompt.text_tokens()[0] == HOLD:
            await self._hold(sample.request_id)
        sequence = GeneratedSequence(stop_reason=StopReason.STOP, tokens=(5, 6), logprobs=(-0.5, -0.25))
        return SampleOutput(sequences=(sequence,) * sample.request.num_samples)

    async def _hold(self, request_id: str) -> None:
        self._waiting.add(request_id)
        try:
            async with self._slots:
                self._waiting.discard(request_id)
                self.started.put(request_id)
                await self._released.wait()
        except asyncio.CancelledError:
            self.cancelled.put(request_id)
            raise
        finally:
            self._waiting.discard(request_id)

    async def is_waiting(self, request_id: str) -> bool:
        return request_id in self._waiting

    async def close(self) -> None:
        pass


def prompt_json(first: int) -> dict[str, Any]:
    """A prompt as samples carry it over HTTP."""
    return {"chunks": [{"type": "encoded_text", "tokens": [first, 4, 5]}]}
