"""Which engine runs a sample: always the same one for a sampling session, because it has the prompt cached."""

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
    """Gives each session an engine, the least loaded one at that moment, and another one when that is lost."""

    def __init__(self, keepers: Sequence[EngineKeeper]) -> None:
        if not keepers:
            raise ConfigurationError("a sampler needs at least one engine")
        self._keepers = keepers
        self._homes: OrderedDict[str, EngineKeeper] = OrderedDict()

    @asynccontextmanager
    async def place(self, session: str, sample: PreparedSample) -> AsyncIterator[tuple[EngineKeeper, EngineLink]]:
        """An engine for the length of a block; waits while none runs. Raises why none can ever serve the sample."""
        keeper, link = await self._choose(session, sample)
        keeper.num_samples += 1
        try:
            yield keeper, link
        finally:
            keeper.num_samples -= 1

    async def _choose(self, session: str, sample: PreparedSample) -> tuple[EngineKeeper, EngineLink]:
        able = [keeper for keeper in self._keepers if keeper.serves(sample)]
        if not able:
            self._keepers[0].require(sample)  # says why
        while True:
            home = self._homes.get(session)
            if home is None or home not in able or home.link is None:
                running = [keeper for keeper in able if keeper.link is not None]
                home = min(running, key=lambda keeper: keeper.num_samples, default=None)
            if home is not None and home.link is not None:
                self._remember(session, home)
                return home, home.link
            await _first_up(able)

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
