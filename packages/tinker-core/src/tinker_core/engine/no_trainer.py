"""In the place of workers, for a base model that a sampler with processes of its own only samples from."""

from __future__ import annotations

import asyncio
from typing import Any

from tinker_core.errors import UnsupportedFeatureError
from tinker_core.executors.protocol import GroupCapabilities
from tinker_core.types import BaseModelSpec, SamplerCapabilities, TrainerCapabilities


class NoTrainer:
    """Implements `tinker_core.interfaces.WorkerGroup` without processes."""

    is_lost = False

    def __init__(self, spec: BaseModelSpec, sampler: SamplerCapabilities) -> None:
        self._spec = spec
        self._capabilities = GroupCapabilities(
            trainer=TrainerCapabilities(
                losses=(),
                optimizers=(),
                max_lora_rank=0,
                max_models=0,
                max_context_length=sampler.max_context_length,
                vocab_size=sampler.vocab_size,
                transports=(),
            ),
            sampler=None,
        )

    async def call(self, method: str, payload: object = None) -> Any:  # noqa: ANN401 - typed per method
        """Answer ``capabilities``; anything else is refused."""
        del payload
        if method == "capabilities":
            return self._capabilities
        raise UnsupportedFeatureError(f"base model {self._spec.name!r} is served for sampling only")

    async def wait_lost(self) -> str:
        """Nothing can be lost."""
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async def close(self) -> None:
        """There is nothing to stop."""
