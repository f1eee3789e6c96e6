"""The rank samplers of a worker group, as one sampler for the engine."""

from __future__ import annotations

import asyncio

from tinker_core.errors import WorkerLostError
from tinker_core.executors.protocol import CancelCall, PublishCall, RetireCall, SaveRevisionCall, WaitingCall
from tinker_core.interfaces import WorkerGroup
from tinker_core.types import PreparedSample, SampleOutput, SamplerCapabilities, WeightsRef


class GroupSampler:
    """Implements `tinker_core.interfaces.Sampler` over the commands of a worker group."""

    def __init__(self, group: WorkerGroup, capabilities: SamplerCapabilities) -> None:
        self._group = group
        self._capabilities = capabilities
        self._cancels: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """The group is running already."""

    def capabilities(self) -> SamplerCapabilities:
        """What the ranks said."""
        return self._capabilities

    async def publish(self, revision: str, ref: WeightsRef) -> None:
        """Publish in every rank."""
        await self._group.call("publish", PublishCall(revision=revision, ref=ref))

    async def save_revision(self, revision: str, directory: str) -> None:
        """Have the ranks write it."""
        await self._group.call("save_revision", SaveRevisionCall(revision=revision, directory=directory))

    async def retire(self, revision: str) -> None:
        """Retire in every rank."""
        await self._group.call("retire", RetireCall(revision=revision))

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        """Generate in the ranks; a cancelled caller frees its slot there."""
        try:
            output: SampleOutput = await self._group.call("sample", sample)
        except asyncio.CancelledError:
            task = asyncio.create_task(self._cancel(sample.request_id))
            self._cancels.add(task)
            task.add_done_callback(self._cancels.discard)
            raise
        return output

    async def is_waiting(self, request_id: str) -> bool:
        """Ask the ranks, which answer between two micro-passes."""
        waiting: bool = await self._group.call("is_waiting", WaitingCall(request_id=request_id))
        return waiting

    async def _cancel(self, request_id: str) -> None:
        try:
            await self._group.call("cancel", CancelCall(request_id=request_id))
        except WorkerLostError:
            return  # the slot went with its process

    async def close(self) -> None:
        """The group's owner closes the group."""
        await asyncio.gather(*self._cancels)
