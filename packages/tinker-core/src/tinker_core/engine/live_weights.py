"""The present weights of a live model, on their way to a sampler."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tinker_core.engine.handoff import Handoff
from tinker_core.executors.protocol import StateCall
from tinker_core.interfaces import WorkerGroup
from tinker_core.types import SamplerCapabilities, TrainerCapabilities, Transport, WeightsRef

_LIVE_TRANSPORTS = (Transport.IN_PROCESS, Transport.SHARED_MEMORY)
"""How weights can go from a trainer to a sampler without files on a disk, best first."""


def best_transport(trainer: TrainerCapabilities, sampler: SamplerCapabilities) -> Transport | None:
    """The transport that both know; None when there is no way but a named save."""
    both = set(sampler.transports) & set(trainer.transports)
    return next((transport for transport in _LIVE_TRANSPORTS if transport in both), None)


async def export_weights(group: WorkerGroup, model_id: str, directory: Path) -> None:
    """Have the trainer write a model's weights into an existing empty directory while it goes on."""
    await group.call("export", StateCall(model_id=model_id, directory=str(directory), background=True))


@asynccontextmanager
async def live_weights(
    group: WorkerGroup, model_id: str, transport: Transport, handoff: Handoff | None
) -> AsyncIterator[WeightsRef]:
    """What a sampler is given by a live transport; ``handoff`` is where weights lie that go through memory."""
    if transport is Transport.IN_PROCESS:
        yield WeightsRef(transport=transport, model_id=model_id)
        return
    assert handoff is not None
    async with handoff.incoming() as directory:
        await export_weights(group, model_id, directory)
        yield WeightsRef(transport=transport, directory=str(directory))
