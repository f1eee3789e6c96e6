"""Fake links, and keepers of places for them: who runs what, and what happens when one is lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from tests.vllm_links.engines import CAPABILITIES
from tinker_core.errors import UnknownCheckpointError, WorkerLostError
from tinker_core.types import GeneratedSequence, PreparedSample, SampleOutput, StopReason
from tinker_sampler_vllm.keeper import EngineKeeper
from tinker_sampler_vllm.protocol import EngineDescription, LoadCall
from tinker_sampler_vllm.restarts import Restarts


async def until(condition: Callable[[], object]) -> None:
    """Let the others go on until something holds; the time limit of `run` ends it if that never is."""
    for _ in itertools.count():
        if condition():
            return
        await asyncio.sleep(0)


class FakeLink:
    """Implements `tinker_sampler_vllm.links.link.EngineLink`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.description = EngineDescription(
            capabilities=CAPABILITIES, base_model="tiny", dtype="float32", vllm_version="0.0", incarnation=name
        )
        self.weights: list[str] = []
        self.loads: list[str] = []
        """All that it was ever asked to load."""
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.may_sample = asyncio.Event()
        self.may_sample.set()
        self.running: dict[str, asyncio.Event] = {}
        self.waiting: set[str] = set()
        self.begun = asyncio.Event()
        self.refusal: Exception | None = None
        """What it answers to every load."""
        self.closed = False
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    async def wait_lost(self) -> str:
        return await asyncio.shield(self._lost)

    def lose(self) -> None:
        """Die."""
        if not self._lost.done():
            self._lost.set_result(f"{self.name} has died")

    async def _unless_lost(self, event: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self.wait_lost())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.is_lost:
            raise WorkerLostError(self._lost.result())

    async def load(self, call: LoadCall) -> None:
        self.loads.append(call.revision)
        await self._unless_lost(self.may_load)
        if self.refusal is not None:
            raise self.refusal
        self.weights.append(call.revision)

    async def retire(self, revision: str) -> None:
        self.weights.remove(revision)

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        if sample.revision is not None and sample.revision not in self.weights:
            raise UnknownCheckpointError(sample.revision)
        self.running[sample.request_id] = asyncio.Event()
        self.begun.set()
        try:
            await self._unless_lost(self.may_sample)
        finally:
            del self.running[sample.request_id]
        sequence = GeneratedSequence(stop_reason=StopReason.LENGTH, tokens=(1,), logprobs=(-1.0,))
        return SampleOutput(sequences=(sequence,) * sample.request.num_samples)

    async def is_waiting(self, request_id: str) -> bool:
        if self.is_lost:
            raise WorkerLostError(self._lost.result())
        return request_id in self.waiting

    async def close(self) -> None:
        self.lose()
        self.closed = True


class Place:
    """A keeper whose engines are fake, and all that have been in it."""

    def __init__(self, name: str, prepare: Callable[[FakeLink], None] = lambda link: None, **fields: Any) -> None:
        """``prepare`` is called with every new engine; what it raises is why that one does not start."""
        self.links: list[FakeLink] = []
        self.num_starts = 0
        self.may_start = asyncio.Event()
        self.may_start.set()
        self._prepare = prepare
        fields.setdefault("restarts", Restarts((0.0,)))
        self.keeper = EngineKeeper(name, self._start, **fields)

    async def _start(self) -> FakeLink:
        self.num_starts += 1
        await self.may_start.wait()
        link = FakeLink(f"{self.keeper.name}, engine {self.num_starts}")
        self._prepare(link)
        self.links.append(link)
        return link

    @property
    def link(self) -> FakeLink:
        """The latest engine."""
        return self.links[-1]

    async def lose(self) -> None:
        """Kill the engine; returns when the next one runs."""
        lost = self.link
        lost.lose()
        await until(lambda: self.keeper.link is not None and self.link is not lost)
