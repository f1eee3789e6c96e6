"""Saved checkpoints: their files, their records, their lifetime, and who may read them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path

from tinker_core.engine.access import AccessTokens
from tinker_core.engine.accounts import Accounts
from tinker_core.engine.clock import Clock
from tinker_core.errors import (
    CheckpointExistsError,
    ForeignCheckpointError,
    InvalidRequestError,
    KeyLimitError,
    StorageError,
    UnknownCheckpointError,
)
from tinker_core.storage.checkpoints import CheckpointStore, location_of, location_of_record, new_version
from tinker_core.storage.control import ControlStore
from tinker_core.types import (
    CheckpointRecord,
    CheckpointType,
    JsonObject,
    KeyLimits,
    LooseFiles,
    TinkerPath,
    TrainingRunRecord,
)

log = logging.getLogger(__name__)

MIN_TTL_SECONDS = 3600
MAX_TTL_SECONDS = 10 * 365 * 24 * 3600


def check_ttl(ttl_seconds: int | None) -> None:
    """Raise `InvalidRequestError` for a lifetime that cannot be asked for."""
    if ttl_seconds is not None and not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
        raise InvalidRequestError(
            f"ttl_seconds={ttl_seconds} must lie between {MIN_TTL_SECONDS} (an hour) and {MAX_TTL_SECONDS} (ten years)"
        )


class Checkpoints:
    """Joins the checkpoint files with their control records. A checkpoint exists from when its record does.

    ``writer`` is what other servers on the same database know this one by, also after a restart.
    """

    def __init__(
        self, store: CheckpointStore, control: ControlStore, clock: Clock, accounts: Accounts, *, writer: str
    ) -> None:
        self.store = store
        self.untidy = asyncio.Event()
        """Set whenever there is something to remove, or may be earlier than it was to be expected."""
        self.saved_runs: set[str] = set()
        """Runs with training checkpoints that nobody has counted yet."""
        self.awaited: set[str] = set()
        """Locations that are to be removed as soon as nobody reads them."""
        self._control = control
        self._saves = control.checkpoint_saves
        self._clock = clock
        self._accounts = accounts
        self._writer = writer
        self._tokens = AccessTokens(control.access_tokens, clock)
        self._stored: Counter[str] = Counter()
        self._reserved: Counter[str] = Counter()

    async def open(self) -> None:
        """Find out what is stored, and give up what an earlier process had not finished; to be called once, at first.

        Files are removed later: nobody waits for them.
        """
        await self.store.open()
        await self._saves.give_up_all(self._writer)
        await self._count()

    async def _count(self) -> None:
        self._stored = Counter(await self._control.checkpoint_queries.stored_bytes())

    def stored_bytes(self, owner: str) -> int:
        """Bytes of an owner's saved checkpoints; kept in memory, so that asking costs nothing."""
        return self._stored[owner]

    # --- saving -------------------------------------------------------------------------------------------------------

    async def finished_save(self, request_id: str) -> TinkerPath | None:
        """What a save request wrote, if it had come to its end before; whatever became of that since."""
        return await self._saves.finished(request_id)

    @asynccontextmanager
    async def save(
        self,
        path: TinkerPath,
        run: TrainingRunRecord,
        request_id: str,
        *,
        ttl_seconds: int | None,
        overwrite: bool,
        user_metadata: JsonObject | None,
        limits: KeyLimits | None = None,
    ) -> AsyncIterator[Path]:
        """Give a directory to write into; when the block succeeds, the checkpoint exists, otherwise nothing does.

        ``limits`` are of the API key that saves; without them, they are found by the request's id. Raises
        `KeyLimitError` when the owner would have more stored than the key may, and `StorageError` for a request that
        has saved before: whoever repeats requests has to ask `finished_save`.
        """
        check_ttl(ttl_seconds)
        finished = await self.finished_save(request_id)
        if finished is not None:
            raise StorageError(f"request {request_id!r} has saved {str(finished)!r} before; it must not save again")
        if not overwrite and await self.find(path) is not None:
            raise CheckpointExistsError(str(path))
        directory = await self.store.begin()
        try:
            yield directory
            limits = limits or self._accounts.limiter.limits_of(request_id)
            version = new_version()
            size = await self.store.seal(directory, location_of(path, version))
            record = CheckpointRecord(
                path=path,
                base_model=run.base_model,
                lora_config=run.lora_config,
                optimizer_config=run.optimizer_config,
                created_at=self._clock.now(),
                size_bytes=size,
                request_id=request_id,
                owner=run.owner,
                project_id=run.project_id,
                user_metadata=user_metadata,
                expires_at=self._expiry(ttl_seconds),
                version=version,
            )
            async with self._reserve(record, limits.max_stored_bytes):
                await self._commit(record, directory, overwrite=overwrite)
        finally:
            await self.store.end(directory)

    @asynccontextmanager
    async def _reserve(self, record: CheckpointRecord, limit: int | None) -> AsyncIterator[None]:
        """Count what is about to be stored, so that saves beside it see it, until it is counted as stored."""
        if limit is None:
            yield
            return
        size, owner = record.size_bytes, record.owner
        replaced = await self._control.get_checkpoint(record.path)
        stored = self._stored[owner] + self._reserved[owner] - (0 if replaced is None else replaced.size_bytes)
        if stored + size > limit:
            raise KeyLimitError(
                f"{str(record.path)!r} has {size} bytes, and with {stored} bytes in other checkpoints it would exceed "
                f"the {limit} bytes that this API key may keep; delete checkpoints, or save with a shorter ttl_seconds"
            )
        self._reserved[owner] += size
        try:
            yield
        finally:
            self._reserved[owner] -= size

    async def _commit(self, record: CheckpointRecord, directory: Path, *, overwrite: bool) -> None:
        location = location_of_record(record)
        files = LooseFiles(
            location=location,
            writer=self._writer,
            created_at=record.created_at,
            owner=record.owner,
            project_id=record.project_id,
        )
        await self._saves.begin(files)
        try:
            await self.store.publish(directory, location)
            replaced = await self._finish(record, overwrite=overwrite)
        except BaseException:
            await self._give_up(location)
            raise
        self._stored[record.owner] += record.size_bytes
        if replaced is not None:
            self._forget(replaced)
        self._note("checkpoint_saved", record, request_id=record.request_id)
        if record.path.kind is CheckpointType.TRAINING:
            self.saved_runs.add(record.path.run_id)
        self.untidy.set()

    async def _finish(self, record: CheckpointRecord, *, overwrite: bool) -> CheckpointRecord | None:
        """Write the record; returns the one that it replaces, as far as that is known."""
        try:
            return await self._saves.finish(record, overwrite=overwrite)
        except StorageError:
            # A database that is lost during a commit may have taken it. Only it can say.
            if await self.finished_save(record.request_id) is None:
                raise
            await self._count()
            self._stored[record.owner] -= record.size_bytes
            return None

    async def _give_up(self, location: str) -> None:
        """Let the files of a failed save be removed; those of a save that succeeded after all stay."""
        try:
            await self._saves.give_up(location)
        except StorageError as error:
            log.error("the files of a failed save stay until the next start: %s", error)
        self.untidy.set()

    # --- reading ------------------------------------------------------------------------------------------------------

    async def find(self, path: TinkerPath) -> CheckpointRecord | None:
        """The record of a checkpoint that exists and has not expired."""
        record = await self._control.get_checkpoint(path)
        return None if record is None or self._expired(record) else record

    async def get(
        self, path: str, owner: str, token: str | None = None, *, purpose: str | None = None
    ) -> CheckpointRecord:
        """The record of a checkpoint that may be read by this owner, by everybody, or with this access token.

        A ``purpose`` is what its files will be read for, which is noted. Raises `UnknownCheckpointError`, which tells
        nothing about the checkpoints of others.
        """
        record = await self.find(TinkerPath.parse(path))
        if record is None:
            raise UnknownCheckpointError(path)
        allowed = record.owner == owner or record.public
        if not allowed and (token is None or not await self._tokens.opens(token, record)):
            raise UnknownCheckpointError(path)
        if purpose is not None:
            self._note("checkpoint_read", record, purpose=purpose)
        return record

    async def owned(self, path: str, owner: str) -> CheckpointRecord:
        """The record of a checkpoint that this owner may change; raises `UnknownCheckpointError`."""
        record = await self.get(path, owner)
        if record.owner != owner:
            raise UnknownCheckpointError(path)
        return record

    async def sizes(self, record: CheckpointRecord) -> dict[str, int]:
        """Bytes of a checkpoint's files by name, in order of name."""
        await self._require_here(record)
        return await self.store.sizes(location_of_record(record))

    @asynccontextmanager
    async def reading(self, record: CheckpointRecord, *, verify: bool = True) -> AsyncIterator[Path]:
        """A local directory with a checkpoint's files, which stay for the length of the block, whatever is removed.

        Raises `DamagedRecordError`, naming the file, for files that are not what was saved. Without ``verify``, that is
        noticed of remote files only.
        """
        await self._require_here(record)
        location = location_of_record(record)
        try:
            async with self.store.reading(location, verify=verify) as directory:
                yield directory
        finally:
            if location in self.awaited and not self.store.is_read(location):
                self.untidy.set()

    async def _require_here(self, record: CheckpointRecord) -> None:
        """Raise `ForeignCheckpointError` for files that are in another server's own store."""
        server_id = record.server_id
        if server_id is None or self._control.server_id in (None, server_id):
            return
        if not await self._control.servers.shares(server_id):
            raise ForeignCheckpointError(str(record.path), server_id)

    # --- changing and removing ----------------------------------------------------------------------------------------

    async def delete(self, path: str, owner: str) -> CheckpointRecord:
        """Remove a checkpoint for good."""
        record = await self.owned(path, owner)
        await self.end(record)
        return record

    async def end(self, record: CheckpointRecord, event: str | None = None, **details: object) -> None:
        """Let a checkpoint be no more, unless it is so already; its files go as soon as nobody reads them.

        What made an end to it, if it was not a caller, is noted as an ``event``.
        """
        if not await self._saves.remove(record, self._clock.now()):
            return
        self._forget(record)
        if event is not None:
            self._note(event, record, **details)
        log.info("removed checkpoint %s", record.path)
        self.untidy.set()

    async def set_ttl(self, path: str, ttl_seconds: int | None, owner: str) -> CheckpointRecord:
        """Let a checkpoint expire so many seconds from now, or never."""
        check_ttl(ttl_seconds)
        record = await self.owned(path, owner)
        await self._control.set_checkpoint_expiry(record.path, self._expiry(ttl_seconds))
        self.untidy.set()
        return record

    def _expired(self, record: CheckpointRecord) -> bool:
        return record.expires_at is not None and record.expires_at <= self._clock.now()

    def _expiry(self, ttl_seconds: int | None) -> datetime | None:
        return None if ttl_seconds is None else self._clock.now() + timedelta(seconds=ttl_seconds)

    def _forget(self, record: CheckpointRecord) -> None:
        self._stored[record.owner] -= record.size_bytes
        self._accounts.usage.checkpoint_removed(record, self._clock.now())

    def _note(self, event: str, record: CheckpointRecord, **details: object) -> None:
        self._accounts.audit.record(
            event,
            owner=record.owner,
            project_id=record.project_id,
            details={"tinker_path": str(record.path), "model_id": record.path.run_id, **details},
        )
