"""Everything about the users of a server: their keys, their limits, what they used and what they did."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Self

from tinker_core.engine.audit import AuditLog
from tinker_core.engine.backlog import LoadBounds
from tinker_core.engine.clock import Clock
from tinker_core.engine.keyring import KeyRing
from tinker_core.engine.limits import KeyLimiter
from tinker_core.engine.usage import UsageLedger, storage_of
from tinker_core.storage.control import ControlStore
from tinker_core.types import CheckpointRecord, SessionRecord, UsageRecord


class Accounts:
    """The parts, made and opened together. An async context manager, to be left before the database is closed."""

    def __init__(
        self, control: ControlStore, clock: Clock, can_progress: Callable[[str], bool], bounds: LoadBounds
    ) -> None:
        self.audit = AuditLog(control.audit, clock)
        self.usage = UsageLedger(control.usage, clock)
        self.keys = KeyRing(control.keys, clock, self.audit)
        self.limiter = KeyLimiter(clock, can_progress, bounds)
        self._control = control
        self._clock = clock
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.audit)
        await self._stack.enter_async_context(self.usage)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def used(self, owner: str, after: datetime, before: datetime) -> list[UsageRecord]:
        """What an owner used in a time, with the storage of the checkpoints that still exist."""
        used = await self.usage.between(after, before, owner)
        now = self._clock.now()
        stored = [storage_of(checkpoint, now) for checkpoint in await self.stored(owner)]
        return [*used, *(record for record in stored if record.starts_at < before and record.ends_at > after)]

    async def stored(self, owner: str) -> list[CheckpointRecord]:
        """An owner's checkpoints that exist."""
        now = self._clock.now()
        checkpoints, _ = await self._control.list_checkpoints(owner)
        return [record for record in checkpoints if record.expires_at is None or record.expires_at > now]

    async def sessions(self, session_ids: Collection[str]) -> dict[str, SessionRecord]:
        """Sessions by id, with the projects they belong to by now."""
        return await self._control.get_sessions(session_ids)
