"""The administration of saved weights: everything that users do with checkpoints besides saving and loading them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Self

import attrs

from tinker_core.engine.audit import AuditLog
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.clock import Clock
from tinker_core.engine.copies import Copies, CopyWeightsInput
from tinker_core.engine.housekeeping import Housekeeping
from tinker_core.engine.registry import Registry
from tinker_core.errors import UnknownCheckpointError, UnknownModelError
from tinker_core.types import Caller, CheckpointRecord, TinkerPath, TrainingRunRecord


@attrs.frozen(kw_only=True)
class CheckpointFiles:
    """A checkpoint and what it consists of."""

    record: CheckpointRecord
    sizes: dict[str, int]
    """Bytes by name."""


class Library:
    """Reads, publishes, copies and removes checkpoints, and notes who did so.

    Others' checkpoints are treated as if they did not exist, unless they are public, and then they can only be read.
    An async context manager: inside it, what is to be removed is removed.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        registry: Registry,
        clock: Clock,
        audit: AuditLog,
        *,
        is_taken: Callable[[str, str], bool],
        keep_last: int | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._housekeeping = Housekeeping(checkpoints, registry.control, clock, keep_last)
        self._copies = Copies(checkpoints, registry, clock, is_taken=is_taken)
        self._registry = registry
        self._clock = clock
        self._queries = registry.control.checkpoint_queries
        self._audit = audit
        self._tidying: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._checkpoints.open()
        self._tidying = asyncio.create_task(self._housekeeping.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._tidying is not None
        self._tidying.cancel()
        await asyncio.gather(self._tidying, return_exceptions=True)
        await self._copies.close()

    def stored_bytes(self, owner: str) -> int:
        """Bytes of an owner's saved checkpoints; kept in memory, so that asking costs nothing."""
        return self._checkpoints.stored_bytes(owner)

    # --- reading ------------------------------------------------------------------------------------------------------

    async def checkpoint(self, path: str, owner: str, token: str | None = None) -> CheckpointRecord:
        """One checkpoint that ``owner``, or the holder of an access token, may read."""
        return await self._checkpoints.get(path, owner, token)

    async def checkpoints(self, owner: str, limit: int | None, offset: int) -> tuple[list[CheckpointRecord], int]:
        """An owner's checkpoints, newest first, and how many there are in all."""
        return await self._queries.list_owned(owner, self._clock.now(), limit, offset)

    async def newest_of(self, run_ids: list[str], reader: str) -> dict[str, list[CheckpointRecord]]:
        """Of each run the newest checkpoint of each kind that a reader may see."""
        return await self._queries.newest(reader, run_ids, self._clock.now())

    async def run(self, run_id: str, reader: str) -> tuple[TrainingRunRecord, list[CheckpointRecord]]:
        """A run that belongs to the reader or has public checkpoints, with those that the reader may see.

        Raises `UnknownModelError`.
        """
        found = await self._queries.list_readable(reader, run_id, self._clock.now())
        try:
            return await self._registry.run(run_id, reader), found
        except UnknownModelError:
            if not found:
                raise
            return await self._registry.run(run_id, found[0].owner), found

    async def accessible_runs(
        self, reader: str, limit: int, offset: int, project_id: str | None
    ) -> tuple[list[TrainingRunRecord], int]:
        """Runs that belong to the reader or have public checkpoints, newest first, and how many there are in all."""
        now = self._clock.now()
        runs, total = await self._queries.list_accessible_runs(reader, now, limit, offset, project_id)
        return [self._registry.freshen(run) for run in runs], total

    async def files(self, path: str, caller: Caller, purpose: str) -> CheckpointFiles:
        """What a checkpoint that the caller may read consists of; the purpose is noted."""
        record = await self._checkpoints.get(path, caller.owner)
        sizes = await self._checkpoints.sizes(record)
        self._note("checkpoint_read", record, caller, purpose=purpose)
        return CheckpointFiles(record=record, sizes=sizes)

    async def version(self, path: TinkerPath, version: str) -> CheckpointRecord:
        """The checkpoint that one save request wrote, for whoever holds a signed URL of it.

        Raises `UnknownCheckpointError` also when something else has been saved under the name since.
        """
        record = await self._checkpoints.find(path)
        if record is None or record.request_id != version:
            raise UnknownCheckpointError(str(path))
        return record

    def reading(self, record: CheckpointRecord, *, verify: bool = True) -> AbstractAsyncContextManager[Path]:
        """A local directory with the files of a checkpoint, which stay for the length of the block.

        With ``verify``, damaged files raise `DamagedRecordError`.
        """
        return self._checkpoints.reading(record, verify=verify)

    # --- changing -----------------------------------------------------------------------------------------------------

    async def delete(self, path: str, caller: Caller) -> None:
        """Remove a checkpoint for good."""
        self._note("checkpoint_deleted", await self._checkpoints.delete(path, caller.owner), caller)

    async def set_ttl(self, path: str, ttl_seconds: int | None, caller: Caller) -> None:
        """Let a checkpoint expire so many seconds from now, or never."""
        record = await self._checkpoints.set_ttl(path, ttl_seconds, caller.owner)
        self._note("checkpoint_ttl_set", record, caller, ttl_seconds=ttl_seconds)

    async def set_public(self, path: str, public: bool, caller: Caller) -> None:
        """Let everybody read a checkpoint, or its owner alone; setting what is set already changes nothing."""
        record = await self._checkpoints.owned(path, caller.owner)
        if record.public == public:
            return
        await self._queries.set_public(record.path, public)
        self._note("checkpoint_published" if public else "checkpoint_unpublished", record, caller)

    async def copy(self, request: CopyWeightsInput, caller: Caller) -> CheckpointRecord:
        """The caller's own copy of a checkpoint that they may read."""

        def copied(source: CheckpointRecord, copy: CheckpointRecord) -> None:
            self._note("checkpoint_read", source, caller, purpose="copy")
            self._note("checkpoint_copied", copy, caller, source_path=request.source_path)

        return await self._copies.copy(request, caller, copied)

    def _note(self, event: str, record: CheckpointRecord, caller: Caller, **details: object) -> None:
        self._audit.record(
            event,
            owner=record.owner,
            project_id=record.project_id,
            key_id=caller.key_id if caller.owner == record.owner else None,
            details={"tinker_path": str(record.path), "model_id": record.path.run_id, **details},
        )
