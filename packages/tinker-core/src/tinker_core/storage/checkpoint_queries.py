"""Questions about saved checkpoints that span owners, runs and time."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from tinker_core.errors import UnknownCheckpointError
from tinker_core.storage.rows import Rows
from tinker_core.storage.tables import checkpoints, training_runs
from tinker_core.types import CheckpointRecord, CheckpointType, TinkerPath, TrainingRunRecord


class CheckpointQueries(Rows):
    """What the engine asks about checkpoints besides their records one by one."""

    async def list_owned(
        self, owner: str, now: datetime, limit: int | None, offset: int
    ) -> tuple[list[CheckpointRecord], int]:
        """An owner's checkpoints that have not expired."""
        return await self._list(
            checkpoints, CheckpointRecord, [checkpoints.c.owner == owner, _alive(now)], limit, offset
        )

    async def list_readable(self, reader: str, run_id: str, now: datetime) -> list[CheckpointRecord]:
        """The checkpoints of a run that a reader owns or everybody may read, newest first."""
        readable = sa.or_(checkpoints.c.owner == reader, checkpoints.c.public)
        conditions = [checkpoints.c.run_id == run_id, readable, _alive(now)]
        return (await self._list(checkpoints, CheckpointRecord, conditions, None, 0))[0]

    async def newest(self, reader: str, run_ids: list[str], now: datetime) -> dict[str, list[CheckpointRecord]]:
        """Of each run the newest readable checkpoint of each kind, newest first."""
        readable = [
            checkpoints.c.run_id.in_(run_ids),
            sa.or_(checkpoints.c.owner == reader, checkpoints.c.public),
            _alive(now),
        ]
        numbers = sa.select(sa.func.max(checkpoints.c.number)).where(*readable).group_by(checkpoints.c.run_id, _KIND)
        found, _ = await self._list(checkpoints, CheckpointRecord, [checkpoints.c.number.in_(numbers)], None, 0)
        by_run: dict[str, list[CheckpointRecord]] = {run_id: [] for run_id in run_ids}
        for record in found:
            by_run[record.path.run_id].append(record)
        return by_run

    async def list_accessible_runs(
        self, reader: str, now: datetime, limit: int, offset: int, project_id: str | None
    ) -> tuple[list[TrainingRunRecord], int]:
        """Training runs that a reader owns, or that have a public checkpoint."""
        public = sa.select(checkpoints.c.run_id).where(checkpoints.c.public, _alive(now))
        conditions = [sa.or_(training_runs.c.owner == reader, training_runs.c.model_id.in_(public))]
        if project_id is not None:
            conditions.append(training_runs.c.project_id == project_id)
        return await self._list(training_runs, TrainingRunRecord, conditions, limit, offset)

    async def surplus(self, run_id: str, keep_last: int) -> list[CheckpointRecord]:
        """All but the newest training checkpoints of a run, among those that are private and have no expiry."""
        conditions = [
            checkpoints.c.run_id == run_id,
            checkpoints.c.path.contains(f"/{CheckpointType.TRAINING.value}/", autoescape=True),
            checkpoints.c.expires_at.is_(None),
            checkpoints.c.public.is_(False),
        ]
        return (await self._list(checkpoints, CheckpointRecord, conditions, None, keep_last))[0]

    async def set_public(self, path: TinkerPath, public: bool) -> None:
        """Open a checkpoint to everybody's eyes, or close it. Raises `UnknownCheckpointError`."""
        statement = sa.update(checkpoints).where(checkpoints.c.path == str(path)).values(public=public)
        await self._change(statement, UnknownCheckpointError(str(path)))

    async def next_expiry(self) -> datetime | None:
        """When the time of the next checkpoint that this server looks after is over; None when that never happens."""
        query = sa.select(checkpoints.c.expires_at).where(checkpoints.c.expires_at.is_not(None))
        query = query.where(self._looked_after(checkpoints.c.server_id))
        query = query.order_by(checkpoints.c.expires_at).limit(1)
        return await self._read(lambda connection: connection.execute(query).scalar())

    async def stored_bytes(self) -> dict[str, int]:
        """Bytes of saved checkpoints by owner."""
        query = sa.select(checkpoints.c.owner, sa.func.sum(checkpoints.c.size_bytes)).group_by(checkpoints.c.owner)
        rows = await self._read(lambda connection: list(connection.execute(query)))
        return {owner: int(size) for owner, size in rows}


_KIND = sa.case(
    *(
        (checkpoints.c.path.contains(f"/{kind.value}/", autoescape=True), index)
        for index, kind in enumerate(CheckpointType)
    ),
    else_=len(CheckpointType),
)
"""A number for a checkpoint's kind. Neither run ids nor names contain a slash."""


def _alive(now: datetime) -> sa.ColumnElement[bool]:
    return sa.or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > now)
