"""Keeps one engine running: what is lost is started, or connected to, again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tinker_core.errors import TinkerError, UserError, WorkerLostError
from tinker_core.types import PreparedSample
from tinker_sampler_vllm.links.link import EngineLink
from tinker_sampler_vllm.protocol import LoadCall
from tinker_sampler_vllm.restarts import Restarts

log = logging.getLogger(__name__)

StartLink = Callable[[], Awaitable[EngineLink]]
Check = Callable[[PreparedSample], None]


class EngineKeeper:
    """The place of one engine; which one is in it changes."""

    def __init__(
        self,
        name: str,
        start: StartLink,
        *,
        takes_weights: bool = True,
        check: Check | None = None,
        restarts: Restarts | None = None,
    ) -> None:
        """``check`` raises the error of a sample that this engine cannot serve, whichever engine it is."""
        self.name = name
        self.takes_weights = takes_weights
        """Whether it can serve anything but the bare base model."""
        self._start = start
        self._check = check
        self._restarts = restarts or Restarts()
        self._put_at = 0.0
        self._link: EngineLink | None = None
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loads: dict[str, asyncio.Task[None]] = {}
        """Revisions that the present engine holds, or is being given."""
        self.num_sequences = 0
        """Sequences that it is generating, or has to begin with."""
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
        self._put_at = asyncio.get_running_loop().time()
        self._up.set()

    async def _keep(self) -> None:
        while True:
            assert self._link is not None
            reason = await self._link.wait_lost()
            self._up.clear()
            self.num_losses += 1
            log.error("%s was lost: %s; it is started again", self.name, reason)
            lost, self._link = self._link, None
            try:
                await lost.close()
            except Exception:
                log.exception("what is left of %s cannot be tidied up", self.name)
            lived = asyncio.get_running_loop().time() - self._put_at
            self._put(await self._restarts.start_again(self.name, self._start, lived))
            log.info("%s runs again", self.name)

    # --- weights ------------------------------------------------------------------------------------------------------

    def has(self, link: EngineLink, revision: str) -> bool:
        """Whether an engine is known to hold weights."""
        task = self._loads.get(revision)
        return link is self._link and task is not None and _has_succeeded(task)

    async def ensure(self, link: EngineLink, call: LoadCall) -> None:
        """Have the present engine hold weights; many may ask at once. Raises its refusal, or `WorkerLostError`."""
        if link is not self._link:
            raise WorkerLostError(f"{self.name} was lost")
        task = self._loads.get(call.revision)
        if task is None or (task.done() and not _has_succeeded(task)):
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


def _has_succeeded(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _retrieve(task: asyncio.Task[None]) -> None:
    """A failed load is told to those who wait for it, if anybody still does."""
    if not task.cancelled():
        task.exception()
