"""Which sampler weights are resident, and how the others come back.

A revision is an immutable name for weights.  Some have files (named saves), some exist only in the sampler (ephemeral
saves).  When more are wanted than the sampler holds, the least recently used one that nobody is using makes room; if it
has no files yet, the sampler writes it out first.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs

from tinker_core.engine.interruption import to_its_end
from tinker_core.errors import UnknownCheckpointError
from tinker_core.interfaces import Sampler
from tinker_core.types import Transport, WeightsRef


@attrs.define(kw_only=True, eq=False)
class _Revision:
    name: str
    directory: Path | None
    """Where its files are; None while they exist in the sampler only."""
    spilled: bool = False
    """Whether the files are ours to delete."""
    resident: bool = False
    users: int = 0
    dropped: bool = False
    loading: asyncio.Lock = attrs.field(factory=asyncio.Lock)


class Revisions:
    """The revisions of one base model's sampler."""

    def __init__(self, sampler: Sampler, spill_directory: Path) -> None:
        self._sampler = sampler
        self._spill_directory = spill_directory
        self._revisions: OrderedDict[str, _Revision] = OrderedDict()
        """Least recently used first."""
        self._spills = 0
        self._room = asyncio.Lock()
        """Held while a revision becomes resident, so that two do not take the same place."""
        self._idle = asyncio.Event()

    @property
    def num_resident(self) -> int:
        """Revisions that the sampler holds now."""
        return sum(revision.resident for revision in self._revisions.values())

    def knows(self, name: str) -> bool:
        """Whether a revision is resident or has files."""
        return name in self._revisions

    async def publish_live(self, name: str, model_id: str, export: Callable[[Path], Awaitable[object]]) -> None:
        """Publish the present weights of a live model that shares a process with the sampler.

        When samples in progress need all the room there is, the weights are exported to a file instead: whoever saves
        never waits for them.
        """
        if self._room.locked() or not self._has_room():
            directory = await self._new_spill()
            await export(directory)
            self._revisions[name] = _Revision(name=name, directory=directory, spilled=True)
            return
        revision = _Revision(name=name, directory=None)
        async with self._room:
            await self._make_room()
            ref = WeightsRef(transport=Transport.IN_PROCESS, model_id=model_id)
            await to_its_end(self._publish(revision, ref))
            self._revisions[name] = revision

    def add_files(self, name: str, directory: Path) -> None:
        """Make a revision known by its files, which stay somebody else's; it becomes resident on its first use."""
        if name not in self._revisions:
            self._revisions[name] = _Revision(name=name, directory=directory)

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[str | None]:
        """Hold a revision resident for the length of a block; None stands for the bare base model."""
        if name is None:
            yield None
            return
        revision = self._revisions.get(name)
        if revision is None:
            raise UnknownCheckpointError(name)
        self._revisions.move_to_end(name)
        revision.users += 1
        try:
            await self._ensure_resident(revision)
            yield name
        finally:
            revision.users -= 1
            self._idle.set()
            if revision.dropped:
                await to_its_end(self._forget(revision))

    async def drop(self, name: str) -> None:
        """Forget a revision, as soon as nobody uses it any more."""
        revision = self._revisions.get(name)
        if revision is not None:
            revision.dropped = True
            await to_its_end(self._forget(revision))

    async def _ensure_resident(self, revision: _Revision) -> None:
        async with revision.loading:
            if revision.resident:
                return
            if revision.directory is None:
                raise UnknownCheckpointError(revision.name)
            ref = WeightsRef(transport=Transport.FILE, directory=str(revision.directory))
            async with self._room:
                await self._make_room()
                await to_its_end(self._publish(revision, ref))

    async def _publish(self, revision: _Revision, ref: WeightsRef) -> None:
        await self._sampler.publish(revision.name, ref)
        revision.resident = True

    def _has_room(self) -> bool:
        """Whether one more fits now, or as soon as one that nobody uses has left."""
        if self.num_resident < self._sampler.capabilities().max_revisions:
            return True
        return any(revision.resident and revision.users == 0 for revision in self._revisions.values())

    async def _make_room(self) -> None:
        """Evict until one more fits; waits while all are in use. Called with the room held."""
        limit = self._sampler.capabilities().max_revisions
        while self.num_resident >= limit:
            self._idle.clear()
            idle = (revision for revision in self._revisions.values() if revision.resident and revision.users == 0)
            victim = next(idle, None)
            if victim is None:
                await self._idle.wait()
            else:
                await to_its_end(self._evict(victim))

    async def _evict(self, revision: _Revision) -> None:
        async with revision.loading:
            if revision.users or not revision.resident:
                return  # it was wanted again, or forgotten, while this waited
            revision.resident = False  # from here on it is this call that retires it, also if it is dropped meanwhile
            spill = await self._new_spill() if revision.directory is None else None
            await self._sampler.retire(revision.name, str(spill) if spill else None)
            if spill is not None:
                revision.directory, revision.spilled = spill, True
            if revision.name not in self._revisions and revision.spilled:
                await self._remove_spill(revision)  # forgotten while it was written

    async def _new_spill(self) -> Path:
        self._spills += 1
        directory = self._spill_directory / f"{self._spills:06d}"
        await asyncio.to_thread(directory.mkdir, parents=True)
        return directory

    async def _forget(self, revision: _Revision) -> None:
        if revision.users or self._revisions.pop(revision.name, None) is None:
            return
        self._idle.set()
        if revision.resident:
            revision.resident = False
            await self._sampler.retire(revision.name, None)
        if revision.spilled:
            await self._remove_spill(revision)

    async def _remove_spill(self, revision: _Revision) -> None:
        assert revision.directory is not None
        await asyncio.to_thread(shutil.rmtree, revision.directory)
