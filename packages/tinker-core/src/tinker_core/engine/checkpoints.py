"""Saved checkpoints: their files, their records, their lifetime."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

from tinker_core.engine.clock import Clock
from tinker_core.errors import CheckpointExistsError, InvalidRequestError, UnknownCheckpointError
from tinker_core.storage.checkpoints import CheckpointStore
from tinker_core.storage.control import ControlStore
from tinker_core.types import CheckpointRecord, JsonObject, TinkerPath, TrainingRunRecord

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

    def __init__(self, store: CheckpointStore, control: ControlStore, clock: Clock) -> None:
        self._store = store
        self._control = control
        self._clock = clock

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
    ) -> AsyncIterator[Path]:
        """Give a directory to write into; when the block succeeds, the checkpoint exists, otherwise nothing does."""
        check_ttl(ttl_seconds)
        if not overwrite and await self.find(path) is not None:
            raise CheckpointExistsError(str(path))
        temporary = await asyncio.to_thread(self._store.begin, path)
        try:
            yield temporary
            size = await asyncio.to_thread(self._store.commit, path, temporary)
        except BaseException:
            await asyncio.to_thread(self._store.abort, temporary)
            raise
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
            expires_at=now + timedelta(seconds=ttl_seconds) if ttl_seconds is not None else None,
        )
        await self._control.put_checkpoint(record, overwrite=True)

    async def find(self, path: TinkerPath) -> CheckpointRecord | None:
        """The record of a checkpoint that exists and has not expired."""
        record = await self._control.get_checkpoint(path)
        if record is not None and self._expired(record):
            await self._remove(record)
            return None
        return record

    async def get(self, path: str, owner: str) -> CheckpointRecord:
        """The record of a checkpoint that this owner may read; raises `UnknownCheckpointError`."""
        record = await self.find(TinkerPath.parse(path))
        if record is None or not (record.owner == owner or record.public):
            raise UnknownCheckpointError(path)
        return record

    async def directory(self, record: CheckpointRecord) -> Path:
        """Where the files of a checkpoint are."""
        return await asyncio.to_thread(self._store.directory, record.path)

    async def list(
        self, owner: str, run_id: str | None, limit: int | None, offset: int
    ) -> tuple[list[CheckpointRecord], int]:
        """Checkpoints that exist, newest first, and how many there are in all."""
        await self.remove_expired()
        return await self._control.list_checkpoints(owner, run_id=run_id, limit=limit, offset=offset)

    async def delete(self, path: str, owner: str) -> None:
        """Remove a checkpoint for good."""
        record = await self.get(path, owner)
        if record.owner != owner:
            raise UnknownCheckpointError(path)
        await self._remove(record)

    async def set_ttl(self, path: str, ttl_seconds: int | None, owner: str) -> None:
        """Let a checkpoint expire so many seconds from now, or never."""
        check_ttl(ttl_seconds)
        record = await self.get(path, owner)
        if record.owner != owner:
            raise UnknownCheckpointError(path)
        expires_at = self._clock.now() + timedelta(seconds=ttl_seconds) if ttl_seconds is not None else None
        await self._control.set_checkpoint_expiry(record.path, expires_at)

    async def remove_expired(self) -> None:
        """Remove every checkpoint whose time is over."""
        for record in await self._control.list_expired_checkpoints(self._clock.now()):
            await self._remove(record)

    def _expired(self, record: CheckpointRecord) -> bool:
        return record.expires_at is not None and record.expires_at <= self._clock.now()

    async def _remove(self, record: CheckpointRecord) -> None:
        """The record first: a crash in between leaves files without a record, never a record without files."""
        await self._control.delete_checkpoint(record.path)
        await asyncio.to_thread(self._store.delete, record.path)
        log.info("removed checkpoint %s", record.path)
