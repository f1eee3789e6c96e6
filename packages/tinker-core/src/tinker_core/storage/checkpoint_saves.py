"""When a checkpoint begins to exist and when it ends: each in one transaction, so that a crash is before or after it.

Files at a location are at any time those of one checkpoint, or loose: of a save in progress, or to be removed.
"""

from __future__ import annotations

from datetime import datetime

import attrs
import sqlalchemy as sa

from tinker_core.errors import CheckpointExistsError, StorageError
from tinker_core.storage.checkpoints import location_of_record
from tinker_core.storage.rows import Rows
from tinker_core.storage.tables import checkpoints, finished_saves, loose_files
from tinker_core.types import CheckpointRecord, FinishedSave, LooseFiles, TinkerPath


class CheckpointSaves(Rows):
    """Changes which checkpoints exist."""

    # --- saves --------------------------------------------------------------------------------------------------------

    async def begin(self, files: LooseFiles) -> None:
        """Note that a server begins to write files, which are to be removed unless it finishes."""
        await self._insert(loose_files, attrs.evolve(files, server_id=self.server_id))

    async def finish(self, record: CheckpointRecord, *, overwrite: bool) -> CheckpointRecord | None:
        """Make files of `begin` a checkpoint, and remember its request; returns the checkpoint that it replaces.

        Raises `CheckpointExistsError` if the path is taken and ``overwrite`` is false, unless by one that has expired.
        """
        row = {**self._row(record), "run_id": record.path.run_id, "server_id": self.server_id}
        finished = FinishedSave(
            request_id=record.request_id,
            path=str(record.path),
            created_at=record.created_at,
            owner=record.owner,
            project_id=record.project_id,
        )

        def work(connection: sa.Connection) -> CheckpointRecord | None:
            written = sa.delete(loose_files).where(loose_files.c.location == location_of_record(record))
            if connection.execute(written).rowcount != 1:
                raise StorageError(f"the files of checkpoint {str(record.path)!r} were given up; save again")
            found = sa.select(checkpoints).where(checkpoints.c.path == str(record.path))
            present = connection.execute(found).mappings().first()
            old = None if present is None else self._record(present, CheckpointRecord)
            if old is not None:
                expired = old.expires_at is not None and old.expires_at <= record.created_at
                if not overwrite and not expired:
                    raise CheckpointExistsError(str(record.path))
                self._loosen(connection, old, record.created_at)
            connection.execute(sa.insert(checkpoints).values(row))
            connection.execute(sa.insert(finished_saves).values(self._row(finished)))
            return old

        return await self._run(work)

    async def finished(self, request_id: str) -> TinkerPath | None:
        """What a request saved, whether or not it still exists; None if it saved nothing."""
        found = await self._get(finished_saves.c.request_id, request_id, FinishedSave)
        return None if found is None else TinkerPath.parse(found.path)

    async def forget_finished(self, before: datetime) -> None:
        """Forget requests that nobody will repeat any more."""
        old = sa.delete(finished_saves).where(finished_saves.c.created_at < before)
        await self._run(lambda connection: connection.execute(old))

    # --- files that have to go ----------------------------------------------------------------------------------------

    async def remove(self, record: CheckpointRecord, at: datetime) -> bool:
        """End a checkpoint; its files become loose. False if it ended already, or was replaced."""

        def work(connection: sa.Connection) -> bool:
            same = sa.select(checkpoints.c.path).where(checkpoints.c.request_id == record.request_id)
            if connection.execute(same.where(checkpoints.c.path == str(record.path))).first() is None:
                return False
            self._loosen(connection, record, at)
            return True

        return await self._run(work)

    async def give_up(self, location: str) -> None:
        """End a save: its files may be removed. A save that is finished stays finished."""
        freed = sa.update(loose_files).where(loose_files.c.location == location).values(writer=None)
        await self._run(lambda connection: connection.execute(freed))

    async def give_up_all(self, writer: str) -> None:
        """End all saves of a server, which writes nothing yet."""
        freed = sa.update(loose_files).where(loose_files.c.writer == writer).values(writer=None)
        await self._run(lambda connection: connection.execute(freed))

    async def loose(self) -> list[str]:
        """Locations of this server's files that are to be removed, those that wait longest first."""
        own = self._looked_after(loose_files.c.server_id)
        return await self._ids(loose_files.c.location, sa.and_(loose_files.c.writer.is_(None), own))

    async def removed(self, location: str) -> None:
        """Note that there are no files at a location any more."""
        gone = sa.delete(loose_files).where(loose_files.c.location == location, loose_files.c.writer.is_(None))
        await self._run(lambda connection: connection.execute(gone))

    def _loosen(self, connection: sa.Connection, record: CheckpointRecord, at: datetime) -> None:
        """Take the record away from files; in the same transaction they become loose."""
        files = LooseFiles(
            location=location_of_record(record),
            writer=None,
            created_at=at,
            owner=record.owner,
            project_id=record.project_id,
            server_id=record.server_id,
        )
        connection.execute(sa.delete(checkpoints).where(checkpoints.c.path == str(record.path)))
        connection.execute(sa.insert(loose_files).values(self._row(files)))
