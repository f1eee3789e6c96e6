"""Full weights in one vLLM engine: it holds one set at a time, the original ones or those of a revision.

The files of a revision stay where they are, and open, until it is dropped: the workers map them into memory when they
are given, so that whoever put them there may remove them, and read them again whenever their turn comes.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from tinker_core.errors import CheckpointMismatchError, WorkerLostError
from tinker_sampler_vllm.engine.turns import WeightTurns
from tinker_sampler_vllm.engine.weight_files import (
    StoredTensor,
    check_same_model,
    embedding_of,
    stored_tensors,
    weight_files,
)

ORIGINAL = 0
"""The number of the base model's own weights."""


class FullWeights:
    """The full weights that an engine can sample from, by number, and which of them are in."""

    def __init__(self, llm: Any, base: dict[str, StoredTensor], *, ties: bool) -> None:  # noqa: ANN401 - vLLM is not typed
        """``base``: the base model's own tensors; ``ties``: vLLM shares one of them between embedding and head."""
        self._llm = llm
        self._base = base
        self._base_is_open = False
        self._ties = ties
        self._turns: WeightTurns[int] = WeightTurns(self._switch, ORIGINAL)

    def using(self, number: int) -> AbstractAsyncContextManager[None]:
        """Wait until weights are in and keep them there; see `WeightTurns.using`."""
        return self._turns.using(number)

    async def load(self, number: int, directory: str) -> None:
        """Take the safetensors files of a directory under a new number; nothing of them is in the device yet.

        Raises `CheckpointMismatchError` unless they hold exactly the tensors of the base model.
        """
        if not self._base:
            raise CheckpointMismatchError(
                "full weights need a base model in safetensors files, to be compared with and to go back to"
            )
        given = await asyncio.to_thread(self._check, Path(directory))
        if not self._base_is_open:
            await self._open(ORIGINAL, self._base)
            self._base_is_open = True
        await self._open(number, given)

    def _check(self, directory: Path) -> dict[str, StoredTensor]:
        given = stored_tensors(weight_files(directory))
        check_same_model(given, self._base, ties=self._ties)
        return given

    async def _open(self, number: int, tensors: dict[str, StoredTensor]) -> None:
        files = list(dict.fromkeys(str(tensor.file) for tensor in tensors.values()))
        embedding = embedding_of(tensors) if self._ties else ""
        for failure in await self._llm.collective_rpc("tinker_open_weights", args=(number, files, embedding)):
            if failure:
                await self.drop(number)
                raise CheckpointMismatchError(f"vLLM cannot read the weights: {failure}")

    async def drop(self, number: int) -> None:
        """Forget a revision that nobody uses; if it is in, it stays until others are wanted."""
        await self._llm.collective_rpc("tinker_close_weights", args=(number,))

    async def _switch(self, number: int) -> None:
        """Nobody samples now. Any failure leaves weights behind that nobody knows, so it ends the engine."""
        await self._llm.pause_generation(mode="wait", clear_cache=False)
        await self._llm.collective_rpc("tinker_use_weights", args=(number,))
        if not await self._llm.reset_prefix_cache():
            raise WorkerLostError("vLLM does not let go of its prefix cache")
        await self._llm.resume_generation()

    @property
    def failure(self) -> str | None:
        """Why the engine can serve nothing any more, once a change has failed."""
        return self._turns.failure

    async def wait_failed(self) -> str:
        """The reason, as soon as a change has failed."""
        return await self._turns.wait_failed()
