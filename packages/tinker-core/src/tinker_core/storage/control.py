"""The control database: sessions, training runs, checkpoints and samplers; never a request body."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

import attrs
import sqlalchemy as sa

from tinker_core.errors import CheckpointExistsError, UnknownCheckpointError, UnknownModelError, UnknownSessionError
from tinker_core.storage.access_tokens import AccessTokenStore
from tinker_core.storage.audit import AuditStore
from tinker_core.storage.checkpoint_queries import CheckpointQueries
from tinker_core.storage.checkpoint_saves import CheckpointSaves
from tinker_core.storage.database import Database
from tinker_core.storage.keys import KeyStore
from tinker_core.storage.rows import Rows
from tinker_core.storage.servers import ServerStore
from tinker_core.storage.session_queries import SessionQueries
from tinker_core.storage.tables import checkpoints, samplers, sessions, training_runs
from tinker_core.storage.usage import UsageStore
from tinker_core.types import CheckpointRecord, SamplerRecord, SessionRecord, TinkerPath, TrainingRunRecord


class ControlStore(Rows):
    """Keeps control records. Methods may be called from one event loop; SQL runs on threads of the database's.

    Every method raises `StorageError` when the database itself fails. ``list_*`` methods return a page, newest first,
    and the number of records on all pages; ``limit=None`` is no limit.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.keys = KeyStore(database)
        self.usage = UsageStore(database)
        self.audit = AuditStore(database)
        self.access_tokens = AccessTokenStore(database)
        self.checkpoint_queries = CheckpointQueries(database)
        self.checkpoint_saves = CheckpointSaves(database)
        self.session_queries = SessionQueries(database)
        self.servers = ServerStore(database)

    @classmethod
    async def open(cls, url: str, server_id: str | None = None) -> ControlStore:
        """Open, and create or upgrade, the database at a URL such as ``sqlite:////data/control.sqlite3``.

        A server names itself, and then looks after its own records only; None is somebody who makes no difference.
        Raises `ConfigurationError` if it cannot be opened or was written by newer code.
        """
        return cls(await Database.open(url, server_id))

    def of_server(self, server_id: str) -> ControlStore:
        """The same store as a server has it, which looks after its own records only."""
        return ControlStore(attrs.evolve(self._database, server_id=server_id))

    @property
    def database(self) -> Database:
        """Where the records are, for tables of others beside them."""
        return self._database

    async def close(self) -> None:
        """Finish what is running and close the database; the store cannot be used afterwards."""
        await self._database.close()

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def add_session(self, record: SessionRecord) -> None:
        """Keep a new session."""
        await self._insert(sessions, attrs.evolve(record, server_id=self.server_id))

    async def get_session(self, session_id: str) -> SessionRecord | None:
        """A session, or None."""
        return await self._get(sessions.c.session_id, session_id, SessionRecord)

    async def get_sessions(self, session_ids: Collection[str]) -> dict[str, SessionRecord]:
        """Those of some sessions that exist, by id."""
        found = sessions.c.session_id.in_(session_ids)
        records, _ = await self._list(sessions, SessionRecord, [found], None, 0)
        return {record.session_id: record for record in records}

    async def list_sessions(self, owner: str, limit: int | None, offset: int) -> tuple[list[SessionRecord], int]:
        """An owner's sessions."""
        return await self._list(sessions, SessionRecord, [sessions.c.owner == owner], limit, offset)

    async def finish_session(self, session_id: str, at: datetime, reason: str | None, detail: str | None) -> None:
        """Mark a session as finished; a second call changes nothing. Raises `UnknownSessionError`."""

        def work(connection: sa.Connection) -> None:
            found = sessions.c.session_id == session_id
            if connection.execute(sa.select(sessions.c.session_id).where(found)).first() is None:
                raise UnknownSessionError(session_id)
            values = {"finished_at": at, "finish_reason": reason, "finish_detail": detail}
            connection.execute(sa.update(sessions).where(found, sessions.c.finished_at.is_(None)).values(values))

        await self._run(work)

    # --- training runs ------------------------------------------------------------------------------------------------

    async def add_run(self, record: TrainingRunRecord) -> None:
        """Keep a new training run."""
        await self._insert(training_runs, record)

    async def get_run(self, model_id: str) -> TrainingRunRecord | None:
        """A training run, or None."""
        return await self._get(training_runs.c.model_id, model_id, TrainingRunRecord)

    async def list_runs(
        self, owner: str, limit: int | None, offset: int, project_id: str | None = None
    ) -> tuple[list[TrainingRunRecord], int]:
        """An owner's training runs, of one project if it is given."""
        conditions = [training_runs.c.owner == owner]
        if project_id is not None:
            conditions.append(training_runs.c.project_id == project_id)
        return await self._list(training_runs, TrainingRunRecord, conditions, limit, offset)

    async def list_run_ids(self, session_id: str) -> list[str]:
        """Ids of a session's training runs, in order of creation."""
        return await self._ids(training_runs.c.model_id, training_runs.c.session_id == session_id)

    async def touch_run(self, model_id: str, at: datetime) -> None:
        """Set when a run was last used. Raises `UnknownModelError`."""
        statement = sa.update(training_runs).where(training_runs.c.model_id == model_id).values(last_request_at=at)
        await self._change(statement, UnknownModelError(model_id))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    async def put_checkpoint(self, record: CheckpointRecord, overwrite: bool) -> None:
        """Keep a checkpoint; raises `CheckpointExistsError` if its path is taken and ``overwrite`` is false."""
        path = str(record.path)
        row = {**self._row(record), "run_id": record.path.run_id, "server_id": self.server_id}

        def work(connection: sa.Connection) -> None:
            if overwrite:
                connection.execute(sa.delete(checkpoints).where(checkpoints.c.path == path))
            elif connection.execute(sa.select(checkpoints.c.path).where(checkpoints.c.path == path)).first():
                raise CheckpointExistsError(path)
            connection.execute(sa.insert(checkpoints).values(row))

        await self._run(work)

    async def get_checkpoint(self, path: TinkerPath) -> CheckpointRecord | None:
        """A checkpoint, or None."""
        return await self._get(checkpoints.c.path, str(path), CheckpointRecord)

    async def list_checkpoints(
        self, owner: str, run_id: str | None = None, limit: int | None = None, offset: int = 0
    ) -> tuple[list[CheckpointRecord], int]:
        """An owner's checkpoints, of one run if it is given."""
        conditions = [checkpoints.c.owner == owner]
        if run_id is not None:
            conditions.append(checkpoints.c.run_id == run_id)
        return await self._list(checkpoints, CheckpointRecord, conditions, limit, offset)

    async def list_all_checkpoints(self, owner: str | None = None) -> list[CheckpointRecord]:
        """Everybody's checkpoints, or one owner's."""
        conditions = [] if owner is None else [checkpoints.c.owner == owner]
        return (await self._list(checkpoints, CheckpointRecord, conditions, None, 0))[0]

    async def list_expired_checkpoints(self, now: datetime) -> list[CheckpointRecord]:
        """Everybody's checkpoints, of those that this server looks after, whose time is over."""
        conditions = [checkpoints.c.expires_at <= now, self._looked_after(checkpoints.c.server_id)]
        return (await self._list(checkpoints, CheckpointRecord, conditions, None, 0))[0]

    async def set_checkpoint_expiry(self, path: TinkerPath, expires_at: datetime | None) -> None:
        """Set when a checkpoint may be removed, None for never. Raises `UnknownCheckpointError`."""
        statement = sa.update(checkpoints).where(checkpoints.c.path == str(path)).values(expires_at=expires_at)
        await self._change(statement, UnknownCheckpointError(str(path)))

    async def delete_checkpoint(self, path: TinkerPath) -> None:
        """Forget a checkpoint. Raises `UnknownCheckpointError`."""
        statement = sa.delete(checkpoints).where(checkpoints.c.path == str(path))
        await self._change(statement, UnknownCheckpointError(str(path)))

    # --- samplers -----------------------------------------------------------------------------------------------------

    async def add_sampler(self, record: SamplerRecord) -> None:
        """Keep a new sampling session."""
        await self._insert(samplers, record)

    async def get_sampler(self, sampling_session_id: str) -> SamplerRecord | None:
        """A sampling session, or None."""
        return await self._get(samplers.c.sampling_session_id, sampling_session_id, SamplerRecord)

    async def add_sampler_clone(self, sampling_session_id: str) -> int:
        """Count one more clone of a sampling session's client; its number, from 1 up, is never given out again."""
        statement = (
            sa.update(samplers)
            .where(samplers.c.sampling_session_id == sampling_session_id)
            .values(num_clones=samplers.c.num_clones + 1)
            .returning(samplers.c.num_clones)
        )
        return await self._run(lambda connection: int(connection.execute(statement).scalar_one()))

    async def list_sampler_ids(self, session_id: str) -> list[str]:
        """Ids of a session's sampling sessions, in order of creation."""
        return await self._ids(samplers.c.sampling_session_id, samplers.c.session_id == session_id)
