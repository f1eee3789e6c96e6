"""Which engine runs a sample: that of its sampling session, which has the prompt cached, while there is room."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from tinker_core.errors import ConfigurationError
from tinker_core.types import PreparedSample
from tinker_sampler_vllm.keeper import EngineKeeper
from tinker_sampler_vllm.links.link import EngineLink

MAX_SESSIONS = 64 * 1024
"""Sessions whose engine is remembered; the least recently used one is forgotten first."""


class Router:
    """Gives each session a home, the least loaded engine at that moment, and another one when that is lost.

    A sample that would have to wait at its home runs elsewhere if there is room: most clients sample from one session
    only, and should have the use of all engines.
    """

    def __init__(self, keepers: Sequence[EngineKeeper], batch_size: int = 64) -> None:
        """``batch_size``: sequences that an engine decodes together."""
        if not keepers:
            raise ConfigurationError("a sampler needs at least one engine")
        self._keepers = keepers
        self._batch_size = batch_size
        self._homes: OrderedDict[str, EngineKeeper] = OrderedDict()

    @asynccontextmanager
    async def place(self, session: str, sample: PreparedSample) -> AsyncIterator[tuple[EngineKeeper, EngineLink]]:
        """An engine for the length of a block; waits while none runs. Raises why none can ever serve the sample."""
        keeper, link = await self._choose(session, sample)
        num_sequences = sample.request.num_samples
        keeper.num_sequences += num_sequences
        try:
            yield keeper, link
        finally:
            keeper.num_sequences -= num_sequences

    async def _choose(self, session: str, sample: PreparedSample) -> tuple[EngineKeeper, EngineLink]:
        able = [keeper for keeper in self._keepers if keeper.serves(sample)]
        if not able:
            self._keepers[0].require(sample)  # says why
        while True:
            running = [(keeper, link) for keeper in able if (link := keeper.link) is not None]
            if running:
                return self._choose_among(running, session)
            await _first_up(able)

    def _choose_among(
        self, running: list[tuple[EngineKeeper, EngineLink]], session: str
    ) -> tuple[EngineKeeper, EngineLink]:
        least = min(running, key=lambda place: place[0].num_sequences)
        home = next((place for place in running if place[0] is self._homes.get(session)), None)
        if home is None:
            self._remember(session, least[0])
            return least
        self._remember(session, home[0])
        is_full = home[0].num_sequences >= self._batch_size
        return least if is_full and least[0].num_sequences < self._batch_size else home

    def _remember(self, session: str, keeper: EngineKeeper) -> None:
        self._homes[session] = keeper
        self._homes.move_to_end(session)
        while len(self._homes) > MAX_SESSIONS:
            self._homes.popitem(last=False)


async def _first_up(keepers: Sequence[EngineKeeper]) -> None:
    waits = [asyncio.create_task(keeper.wait_up()) for keeper in keepers]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
