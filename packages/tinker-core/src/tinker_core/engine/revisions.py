"""Which sampler weights exist, which are resident, and how the others come back.

A revision is an immutable name for weights.  Some have files: those of a named save, or files of our own, which outlive
the workers and the server.  Others exist only in the sampler, until `Revisions.persist` or an eviction writes them out;
when the workers die before that, they are expected to be published again by a replay of their model's requests, and who
wants them waits.  When more are wanted than the sampler holds, the least recently used one that nobody is using makes
room.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from tinker_core.engine.interruption import to_its_end
from tinker_core.engine.revision import Revision, Source
from tinker_core.errors import (
    DamagedRecordError,
    LostWeightsError,
    UnknownCheckpointError,
    WorkerLostError,
)
from tinker_core.interfaces import Sampler
from tinker_core.storage.checkpoints import safe_directory_name
from tinker_core.storage.sealed import (
    make_directory,
    make_durable_directory,
    put_in_place,
    remove,
    seal,
    sealed_name,
    size_on_disk,
    verify,
)
from tinker_core.types import Transport, WeightsRef

log = logging.getLogger(__name__)

_INCOMING = ".incoming"
"""Files that are being written; no revision's directory begins with a dot."""

Write = Callable[[Path], Awaitable[object]]
"""Writes weights into an empty directory."""
LiveWeights = Callable[[], AbstractAsyncContextManager[WeightsRef]]
"""Makes a reference to the present weights of a live model, good for the length of a block."""


class Revisions:
    """The revisions of one base model. They outlive its workers: `attach` and `detach` tell when there is a sampler."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sampler: Sampler | None = None
        self._revisions: dict[str, Revision] = {}
        self._resident: OrderedDict[str, Revision] = OrderedDict()
        """Those that the sampler holds, least recently used first."""
        self._room = asyncio.Lock()
        """Held while a revision becomes resident, so that two do not take the same place. Its holder may wait for the
        ``lock`` of a resident revision, so nobody waits for room with such a lock."""
        self._idle = asyncio.Event()
        self._gone = asyncio.Event()
        """Set while no sampler is attached."""

    # --- the sampler comes and goes -----------------------------------------------------------------------------------

    def load(self) -> None:
        """Find what an earlier process has written; blocks, and is to be called once, before anything else.

        Damaged files are found when they are used. Raises `StorageError`.
        """
        make_durable_directory(self._directory)
        remove(self._directory / _INCOMING)
        for directory in sorted(self._directory.iterdir()):
            try:
                name = sealed_name(directory)
            except DamagedRecordError as error:
                log.error("sampler weights cannot be used: %s", error)
                continue
            if _is_saved_elsewhere(name):
                remove(directory)  # their sampling sessions read the checkpoint again
                continue
            revision = self._add(name)
            revision.directory = directory
            revision.num_bytes = size_on_disk(directory)
            revision.settle()

    def attach(self, sampler: Sampler) -> None:
        """A sampler runs; nothing is resident in it yet."""
        self._sampler = sampler
        self._gone.clear()

    def detach(self) -> None:
        """The sampler is gone with all that it held; what has no files is expected to be published again."""
        self._sampler = None
        for revision in self._revisions.values():
            revision.expected = revision.expected or revision.resident
            revision.resident = False
            revision.settle()
        self._resident.clear()
        self._idle.set()
        self._gone.set()

    async def wait_detached(self, sampler: Sampler) -> None:
        """Return when a sampler is not, or no longer, the one that is attached."""
        while self._sampler is sampler:
            await self._gone.wait()

    # --- what there is ------------------------------------------------------------------------------------------------

    @property
    def num_resident(self) -> int:
        """Revisions that the sampler holds now."""
        return len(self._resident)

    @property
    def num_stored(self) -> int:
        """Revisions with files of our own."""
        return sum(revision.directory is not None for revision in self._revisions.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of these files."""
        return sum(revision.num_bytes for revision in self._revisions.values())

    @property
    def max_resident(self) -> int:
        """Revisions that fit into the sampler at once; raises `WorkerLostError` while there is none."""
        return self._attached().capabilities().max_revisions

    def ephemeral(self) -> list[str]:
        """The revisions that were not saved under a name, and that nobody has dropped."""
        return [name for name, revision in self._revisions.items() if revision.source is None and not revision.dropped]

    def knows(self, name: str) -> bool:
        """Whether a revision is resident, has files or is expected."""
        return name in self._revisions and not self._revisions[name].dropped

    def add_saved(self, name: str, source: Source) -> None:
        """Make saved weights known, by files that stay somebody else's; they become resident on their first use."""
        if name not in self._revisions:
            revision = self._add(name)
            revision.source = source
            revision.settle()

    def expect(self, name: str) -> None:
        """A replay will publish this revision: whoever wants it waits until then."""
        revision = self._revisions.get(name) or self._add(name)
        revision.failure, revision.expected = None, True
        revision.settle()

    def give_up(self, model_id: str | None, error: BaseException) -> None:
        """No replay will publish what is expected of a model, or of any: whoever waits for it learns why."""
        for revision in self._revisions.values():
            if model_id in (None, revision.model_id):
                revision.lose(str(error))

    # --- publishing and using -----------------------------------------------------------------------------------------

    async def publish_live(self, name: str, export: Write, live: LiveWeights) -> None:
        """Publish the present weights of a live model, on the way that ``live`` knows.

        A name that has weights keeps them: so a replay changes nothing. When samples in progress need all the room
        there is, the weights are exported to files instead: whoever saves never waits for them.
        """
        revision = self._revisions.get(name) or self._add(name)
        if revision.has_weights:
            return  # without waiting for samples that wait for room
        revision.publishers += 1
        try:
            async with revision.lock:
                if not revision.has_weights:
                    await self._take_live(revision, export, live)
        finally:
            revision.publishers -= 1
            if not revision.is_wanted:
                self._revisions.pop(name, None)
                revision.lose("they were never published")

    async def _take_live(self, revision: Revision, export: Write, live: LiveWeights) -> None:
        if self._room.locked() or not self._has_room():
            await to_its_end(self._write(revision, export))
            return
        async with self._room:
            if await self._make_room(waiting=False):
                await to_its_end(self._publish_from(revision, live))
                return
        await to_its_end(self._write(revision, export))

    async def _publish_from(self, revision: Revision, live: LiveWeights) -> None:
        async with live() as ref:
            await self._publish(revision, ref)

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[str | None]:
        """Hold a revision resident for the length of a block; None stands for the bare base model.

        Raises `UnknownCheckpointError` for an unknown name, `LostWeightsError` for weights that are not to be had any
        more, `DamagedRecordError` for damaged files and `WorkerLostError` when the sampler goes before it is resident.
        """
        if name is None:
            yield None
            return
        if not self.knows(name):
            raise UnknownCheckpointError(name)
        revision = self._revisions[name]
        if revision.resident:
            self._resident.move_to_end(name)
        revision.users += 1
        try:
            await self._ensure_resident(revision)
            yield name
        finally:
            revision.users -= 1
            self._idle.set()
            if revision.dropped:
                await to_its_end(self._forget(revision))

    async def persist(self, model_id: str) -> None:
        """Write every revision of a model that exists in the sampler only; all of them are durable when this returns.

        Raises `WorkerLostError` and `StorageError`.
        """
        for revision in self._of(model_id):
            if not revision.has_files:
                await to_its_end(self._persist(revision))

    async def secure(self, model_id: str) -> None:
        """`persist`, whatever happens to the workers meanwhile: what they lose is waited for and written then."""
        while True:
            for revision in self._of(model_id):
                await revision.settled.wait()
            sampler = self._sampler
            try:
                await self.persist(model_id)
            except WorkerLostError:
                if sampler is not None:
                    await self.wait_detached(sampler)
            if all(revision.has_files or revision.failure is not None for revision in self._of(model_id)):
                return

    def _of(self, model_id: str) -> list[Revision]:
        revisions = self._revisions.values()
        return [revision for revision in revisions if revision.model_id == model_id and not revision.dropped]

    async def drop(self, name: str) -> None:
        """Forget a revision and its files, as soon as nobody uses it any more."""
        revision = self._revisions.get(name)
        if revision is not None:
            revision.dropped = True
            revision.lose("their session has ended, or newer weights have taken their place")
            await to_its_end(self._forget(revision))

    # --- residence ----------------------------------------------------------------------------------------------------

    def _attached(self) -> Sampler:
        if self._sampler is None:
            raise WorkerLostError("the sampler is not running")
        return self._sampler

    async def _ensure_resident(self, revision: Revision) -> None:
        while not revision.resident:
            await revision.settled.wait()
            async with revision.loading:
                await self._load(revision)

    async def _load(self, revision: Revision) -> None:
        """Make it resident, if it is not and has files; raises why it never will."""
        if revision.resident:
            return
        if revision.directory is not None:
            if not revision.verified:
                await asyncio.to_thread(verify, revision.directory)
                revision.verified = True
            await self._load_files(revision, revision.directory)
        elif revision.source is not None:
            async with revision.source.open() as directory:
                await self._load_files(revision, directory)
        elif revision.failure is not None:
            raise LostWeightsError(revision.name, revision.failure)

    async def _load_files(self, revision: Revision, directory: Path) -> None:
        async with self._room:
            await self._make_room()
            ref = WeightsRef(transport=Transport.FILE, directory=str(directory))
            await to_its_end(self._publish(revision, ref))

    async def _publish(self, revision: Revision, ref: WeightsRef) -> None:
        sampler = self._attached()
        await sampler.publish(revision.name, ref)
        if self._sampler is not sampler:
            raise WorkerLostError("the sampler ended while it took weights")
        revision.resident = True
        self._resident[revision.name] = revision
        revision.settle()

    def _has_room(self) -> bool:
        """Whether one more fits now, or as soon as one that nobody uses has left."""
        if self.num_resident < self.max_resident:
            return True
        return any(revision.is_idle() for revision in self._resident.values())

    async def _make_room(self, *, waiting: bool = True) -> bool:
        """Evict until one more fits; while all are in use, wait or return False. Called with the room held."""
        while self.num_resident >= self.max_resident:
            self._idle.clear()
            idle = (revision for revision in self._resident.values() if revision.is_idle())
            victim = next(idle, None)
            if victim is not None:
                await to_its_end(self._evict(victim))
            elif waiting:
                await self._idle.wait()
            else:
                return False
        return True

    async def _evict(self, revision: Revision) -> None:
        async with revision.lock:
            if not revision.is_idle():
                return  # it was wanted again, or forgotten, while this waited
            needs_files = revision.directory is None
            if needs_files and revision.source is not None:
                needs_files = not await revision.source.is_there()
            if needs_files and revision.is_idle():
                await self._write(revision, self._saving(revision))
            if revision.is_idle():
                self._leave(revision)
                await self._attached().retire(revision.name)

    # --- files --------------------------------------------------------------------------------------------------------

    async def _persist(self, revision: Revision) -> None:
        async with revision.lock:
            if revision.resident and not revision.has_files and not revision.dropped:
                await self._write(revision, self._saving(revision))

    def _saving(self, revision: Revision) -> Write:
        sampler = self._attached()  # which has it now; a later one has not

        async def save(directory: Path) -> None:
            await sampler.save_revision(revision.name, str(directory))

        return save

    async def _write(self, revision: Revision, write: Write) -> None:
        temporary = self._directory / _INCOMING / uuid.uuid4().hex
        target = self._directory / safe_directory_name(revision.name)
        try:
            await asyncio.to_thread(make_directory, temporary)
            await write(temporary)
            num_bytes = await asyncio.to_thread(seal, temporary, revision.name)
            await asyncio.to_thread(put_in_place, temporary, target)
        except BaseException:
            await asyncio.to_thread(remove, temporary)
            raise
        revision.directory, revision.verified = target, True
        revision.num_bytes = num_bytes
        revision.settle()

    async def _forget(self, revision: Revision) -> None:
        if revision.in_use():
            return  # the last user does it
        async with revision.lock:
            if self._revisions.get(revision.name) is not revision or revision.in_use():
                return
            if revision.resident and self._sampler is not None:
                try:
                    await self._sampler.retire(revision.name)
                except WorkerLostError:
                    log.debug("revision %s went with its sampler", revision.name)
                self._leave(revision)
                self._idle.set()
            if revision.directory is not None:
                await asyncio.to_thread(remove, revision.directory)
            del self._revisions[revision.name]
            self._idle.set()

    def _leave(self, revision: Revision) -> None:
        revision.resident = False
        self._resident.pop(revision.name, None)

    def _add(self, name: str) -> Revision:
        revision = self._revisions[name] = Revision(name=name)
        return revision


def _is_saved_elsewhere(name: str) -> bool:
    """Whether a revision's weights are a checkpoint's."""
    return name.startswith("tinker://")
