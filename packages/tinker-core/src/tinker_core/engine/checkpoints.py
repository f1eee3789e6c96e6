"""Saved checkpoints: their files, their records, their lifetime, and who may read them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from weakref import WeakValueDictionary

from tinker_core.engine.access import AccessTokens
from tinker_core.engine.accounts import Accounts
from tinker_core.engine.clock import Clock
from tinker_core.errors import CheckpointExistsError, InvalidRequestError, KeyLimitError, UnknownCheckpointError
from tinker_core.storage.checkpoints import CheckpointStore, size_of
from tinker_core.storage.control import ControlStore
from tinker_core.types import CheckpointRecord, JsonObject, KeyLimits, TinkerPath, TrainingRunRecord

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
    """Joins the checkpoint files with their control records."""

    def __init__(self, store: CheckpointStore, control: ControlStore, clock: Clock, accounts: Accounts) -> None:
        self.store = store
        self.expiries_changed = asyncio.Event()
        """Set whenever some checkpoint may now expire earlier than all others did."""
        self._control = control
        self._clock = clock
        self._accounts = accounts
        self._tokens = AccessTokens(control.access_tokens, clock)
        self._stored: Counter[str] = Counter()
        self._reserved: Counter[str] = Counter()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def open(self) -> None:
        """Find out what is stored; to be called once, before anything else."""
        self._stored = Counter(await self._control.checkpoint_queries.stored_bytes())

    def stored_bytes(self, owner: str) -> int:
        """Bytes of an owner's saved checkpoints; kept in memory, so that asking costs nothing."""
        return self._stored[owner]

    # --- saving -------------------------------------------------------------------------------------------------------

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
        `KeyLimitError` when the owner would have more stored than the key may.
        """
        check_ttl(ttl_seconds)
        if not overwrite and await self.find(path) is not None:
            raise CheckpointExistsError(str(path))
        temporary = await asyncio.to_thread(self.store.begin, path)
        try:
            yield temporary
            limits = limits or self._accounts.limiter.limits_of(request_id)
            async with self._lock(path), self._reserve(path, run.owner, temporary, limits.max_stored_bytes):
                await self._commit(path, run, request_id, temporary, ttl_seconds, user_metadata)
        except BaseException:
            await asyncio.to_thread(self.store.abort, temporary)
            raise

    @asynccontextmanager
    async def _reserve(self, path: TinkerPath, owner: str, temporary: Path, limit: int | None) -> AsyncIterator[None]:
        """Count what is about to be stored, so that saves beside it see it, until it is counted as stored."""
        if limit is None:
            yield
            return
        size = await asyncio.to_thread(size_of, temporary)
        replaced = await self._control.get_checkpoint(path)
        stored = self._stored[owner] + self._reserved[owner] - (0 if replaced is None else replaced.size_bytes)
        if stored + size > limit:
            raise KeyLimitError(
                f"{str(path)!r} has {size} bytes, and with {stored} bytes in other checkpoints it would exceed the "
                f"{limit} bytes that this API key may keep; delete checkpoints, or save with a shorter ttl_seconds"
            )
        self._reserved[owner] += size
        try:
            yield
        finally:
            self._reserved[owner] -= size

    async def _commit(
        self,
        path: TinkerPath,
        run: TrainingRunRecord,
        request_id: str,
        temporary: Path,
        ttl_seconds: int | None,
        user_metadata: JsonObject | None,
    ) -> None:
        size = await asyncio.to_thread(self.store.commit, path, temporary)
        replaced = await self._control.get_checkpoint(path)
        now = self._clock.now()
        record = CheckpointRecord(
            path=path,
            base_model=run.base_model,
            lora_config=run.lora_config,
            optimizer_config=run.optimizer_config,
            created_at=now,
            size_bytes=size,
            request_id=request_id,
            owner=run.owner,
            project_id=run.project_id,
            user_metadata=user_metadata,
            expires_at=self._expiry(ttl_seconds),
        )
        await self._control.put_checkpoint(record, overwrite=True)
        self._stored[record.owner] += record.size_bytes
        if replaced is not None:
            self._forget(replaced)
        self._note("checkpoint_saved", record, request_id=request_id)
        self.expiries_changed.set()

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

    async def directory(self, record: CheckpointRecord) -> Path:
        """Where the files of a checkpoint are."""
        return await asyncio.to_thread(self.store.directory, record.path)

    # --- changing and removing ----------------------------------------------------------------------------------------

    async def delete(self, path: str, owner: str) -> CheckpointRecord:
        """Remove a checkpoint for good."""
        record = await self.owned(path, owner)
        await self._remove(record)
        return record

    async def set_ttl(self, path: str, ttl_seconds: int | None, owner: str) -> CheckpointRecord:
        """Let a checkpoint expire so many seconds from now, or never."""
        check_ttl(ttl_seconds)
        record = await self.owned(path, owner)
        await self._control.set_checkpoint_expiry(record.path, self._expiry(ttl_seconds))
        self.expiries_changed.set()
        return record

    async def remove_expired(self) -> datetime | None:
        """Remove every checkpoint whose time is over; returns when the next one's will be."""
        for record in await self._control.list_expired_checkpoints(self._clock.now()):
            await self._remove(record)
            self._note("checkpoint_expired", record)
        return await self._control.checkpoint_queries.next_expiry()

    def _expired(self, record: CheckpointRecord) -> bool:
        return record.expires_at is not None and record.expires_at <= self._clock.now()

    def _expiry(self, ttl_seconds: int | None) -> datetime | None:
        return None if ttl_seconds is None else self._clock.now() + timedelta(seconds=ttl_seconds)

    def _lock(self, path: TinkerPath) -> asyncio.Lock:
        """Held while files and record of one path change together."""
        return self._locks.setdefault(str(path), asyncio.Lock())

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

    async def _remove(self, record: CheckpointRecord) -> None:
        """The files first: after a crash in between, the record still tells what to remove again."""
        async with self._lock(record.path):
            present = await self._control.get_checkpoint(record.path)
            if present is None or present.request_id != record.request_id:
                return  # somebody else removed it, or saved anew in its place
            try:
                await asyncio.to_thread(self.store.delete, record.path)
            except UnknownCheckpointError:
                log.warning("the files of checkpoint %s were gone already", record.path)
            await self._control.delete_checkpoint(record.path)
            self._forget(record)
        log.info("removed checkpoint %s", record.path)
