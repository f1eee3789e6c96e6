"""Keeps one engine running: what is lost is started, or connected to, again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tinker_core.errors import TinkerError, UserError, WorkerLostError
from tinker_core.types import PreparedSample
from tinker_sampler_vllm.links.link import EngineLink
from tinker_sampler_vllm.protocol import LoadCall

log = logging.getLogger(__name__)

_PAUSES = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before an engine is started again that did not come up so often."""

StartLink = Callable[[], Awaitable[EngineLink]]
Check = Callable[[PreparedSample], None]


class EngineKeeper:
    """The place of one engine; which one is in it changes."""

    def __init__(
        self,
        name: str,
        start: StartLink,
        *,
        shares_machine: bool = True,
        takes_weights: bool = True,
        check: Check | None = None,
    ) -> None:
        """``check`` raises the error of a sample that this engine cannot serve, whichever engine it is."""
        self.name = name
        self.shares_machine = shares_machine
        """Whether the engine can read this machine's files."""
        self.takes_weights = takes_weights
        """Whether it can serve anything but the bare base model."""
        self._start = start
        self._check = check
        self._link: EngineLink | None = None
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loads: dict[str, asyncio.Task[None]] = {}
        """Revisions that the present engine holds, or is being given."""
        self.num_samples = 0
        """Samples that it has in progress."""
        self.num_losses = 0
        """How often an engine was lost here."""

    def require(self, sample: PreparedSample) -> None:
        """Raise why this engine cannot serve a sample, if it cannot."""
        if self._check is not None:
            self._check(sample)

    def serves(self, sample: PreparedSample) -> bool:
        """Whether this engine can serve a sample."""
        try:
            self.require(sample)
        except UserError:
            return False
        return True

    async def start(self) -> None:
        """Start the first engine; raises why it does not start."""
        self._put(await self._start())
        self._task = asyncio.create_task(self._keep())

    @property
    def link(self) -> EngineLink | None:
        """The running engine, if there is one now."""
        link = self._link
        return None if link is None or link.is_lost else link

    async def wait_up(self) -> None:
        """Return when an engine runs."""
        await self._up.wait()

    def _put(self, link: EngineLink) -> None:
        self._link = link
        self._loads = {}
        self._up.set()

    async def _keep(self) -> None:
        while True:
            assert self._link is not None
            reason = await self._link.wait_lost()
            self._up.clear()
            self.num_losses += 1
            log.error("%s was lost: %s; it is started again", self.name, reason)
            lost, self._link = self._link, None
            await lost.close()
            self._put(await self._start_again())
            log.info("%s runs again", self.name)

    async def _start_again(self) -> EngineLink:
        failures = 0
        while True:
            await asyncio.sleep(_PAUSES[min(failures, len(_PAUSES) - 1)])
            try:
                return await self._start()
            except Exception as error:
                if not isinstance(error, TinkerError):
                    log.exception("%s failed", self.name)
                failures += 1
                log.error("%s does not start: %s", self.name, error)

    # --- weights ------------------------------------------------------------------------------------------------------

    def has(self, link: EngineLink, revision: str) -> bool:
        """Whether an engine is known to hold weights."""
        task = self._loads.get(revision)
        return link is self._link and task is not None and task.done() and task.exception() is None

    async def ensure(self, link: EngineLink, call: LoadCall) -> None:
        """Have the present engine hold weights; many may ask at once. Raises its refusal, or `WorkerLostError`."""
        if link is not self._link:
            raise WorkerLostError(f"{self.name} was lost")
        task = self._loads.get(call.revision)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._loads[call.revision] = asyncio.create_task(link.load(call))
            task.add_done_callback(_retrieve)
        await asyncio.shield(task)

    async def retire(self, revision: str) -> None:
        """Have the present engine forget weights, if it has them."""
        task, link = self._loads.pop(revision, None), self.link
        if task is None or link is None:
            return
        try:
            await asyncio.shield(task)
            await link.retire(revision)
        except TinkerError as error:
            log.debug("%s does not hold %s: %s", self.name, revision, error)

    async def close(self) -> None:
        """Stop the engine."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._link is not None:
            await self._link.close()
            self._link = None


def _retrieve(task: asyncio.Task[None]) -> None:
    """A failed load is told to those who wait for it, if anybody still does."""
    if not task.cancelled():
        task.exception()
