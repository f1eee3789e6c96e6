"""Training jobs and their logs in the control database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import attrs
import sqlalchemy as sa

from tinker_core.storage.database import Database
from tinker_jobs.errors import UnknownJobError
from tinker_jobs.protocol import CONVERTER, ResumePoint
from tinker_jobs.records import JobRecord, JobStatus, LogRecord
from tinker_jobs.refs import FrozenRefs
from tinker_jobs.service.tables import SCHEMA, metadata, training_job_lines, training_jobs

LINES_AT_ONCE = 1000
"""Most lines that one reading of a log returns."""

_FROZEN = ("job_id", "owner", "project_id", "key_id", "server_id", "request", "refs", "base_model", "created_at")
"""Columns that nothing changes once a job was submitted."""
_DERIVED = ("number", "backend", "trainer_type", "project_ref")


@attrs.frozen(kw_only=True)
class NewLine:
    """A line for a job's log; the fields are those of `LogRecord`."""

    job_id: str
    owner: str
    project_id: str | None
    timestamp: datetime
    event_type: str
    level: str
    message: str
    data: Mapping[str, Any] = attrs.field(factory=dict)
    metrics: Mapping[str, Any] = attrs.field(factory=dict)
    resume_step: int | None = None


class JobStore:
    """Keeps jobs and their logs for good.

    Every method raises `StorageError` when the database itself fails, and `DatabaseUnavailableError` when it cannot be
    reached.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    async def open(cls, database: Database) -> JobStore:
        """Bring the tables up to date; raises `ConfigurationError` for what newer code has written."""
        await database.migrate(SCHEMA)
        return cls(database.of_tables(metadata))

    # --- changing -----------------------------------------------------------------------------------------------------

    async def add(self, record: JobRecord, lines: Sequence[NewLine] = ()) -> None:
        """Keep a new job, with the first lines of its log."""
        row = {**_row(record), **_derived(record)}

        def work(connection: sa.Connection) -> None:
            connection.execute(sa.insert(training_jobs).values(row))
            _insert(connection, lines)

        await self._database.write(work)

    async def update(self, record: JobRecord, lines: Sequence[NewLine] = ()) -> None:
        """Keep what has changed about a job, together with what its log says of that. Raises `UnknownJobError`."""
        row = {name: value for name, value in _row(record).items() if name not in _FROZEN}
        statement = sa.update(training_jobs).where(training_jobs.c.job_id == record.job_id).values(row)

        def work(connection: sa.Connection) -> int:
            _insert(connection, lines)
            return connection.execute(statement).rowcount

        if not await self._database.write(work):
            raise UnknownJobError

    async def append(self, lines: Sequence[NewLine]) -> None:
        """Add to the logs of any jobs, in this order, all or nothing."""
        if lines:
            await self._database.write(lambda connection: _insert(connection, lines))

    # --- reading ------------------------------------------------------------------------------------------------------

    async def get(self, job_id: str, owner: str) -> JobRecord:
        """A job; raises `UnknownJobError` for one that does not exist or is somebody else's."""
        query = sa.select(training_jobs).where(training_jobs.c.job_id == job_id, training_jobs.c.owner == owner)
        row = await self._database.read(lambda connection: connection.execute(query).mappings().first())
        if row is None:
            raise UnknownJobError
        return _record(row)

    async def logs(self, job_id: str, after: int = 0, limit: int | None = None) -> list[LogRecord]:
        """Lines of a job's log behind a number, oldest first."""
        return await self._lines(job_id, training_job_lines.c.number > after, limit)

    async def reports(self, job_id: str) -> list[LogRecord]:
        """All lines of a job that say something of its metrics and of where it went on, oldest first."""
        return await self._lines(job_id, training_job_lines.c.event_type != "log", None)

    async def _lines(self, job_id: str, condition: sa.ColumnElement[bool], limit: int | None) -> list[LogRecord]:
        columns = training_job_lines.c
        wanted = [columns[field.name] for field in attrs.fields(LogRecord)]
        query = sa.select(*wanted).where(columns.job_id == job_id, condition).order_by(columns.number).limit(limit)
        rows = await self._database.read(lambda connection: list(connection.execute(query).mappings()))
        return [LogRecord(**row) for row in rows]

    async def unfinished(self, server_id: str) -> list[JobRecord]:
        """A server's jobs that wait or run, or whose process has a key, oldest first."""
        columns = training_jobs.c
        waiting = columns.status.in_([JobStatus.QUEUED.value, JobStatus.RUNNING.value])
        condition = sa.and_(columns.server_id == server_id, sa.or_(waiting, columns.run_key_id.is_not(None)))
        query = sa.select(training_jobs).where(condition).order_by(columns.number)
        rows = await self._database.read(lambda connection: list(connection.execute(query).mappings()))
        return [_record(row) for row in rows]

    async def list(
        self,
        owner: str,
        *,
        page: int = 1,
        page_size: int = 20,
        status: str | None = None,
        backend: str | None = None,
        trainer_type: str | None = None,
        project_ref: str | None = None,
    ) -> tuple[list[JobRecord], int]:
        """A page of an owner's jobs, newest first, and how many there are on all pages; pages begin at 1."""
        wanted = {"status": status, "backend": backend, "trainer_type": trainer_type, "project_ref": project_ref}
        columns = training_jobs.c
        conditions = [columns.owner == owner]
        conditions += [columns[name] == value for name, value in wanted.items() if value is not None]
        query = sa.select(training_jobs).where(*conditions).order_by(columns.created_at.desc(), columns.number.desc())
        query = query.limit(page_size).offset((page - 1) * page_size)
        count = sa.select(sa.func.count()).select_from(training_jobs).where(*conditions)

        def work(connection: sa.Connection) -> tuple[list[sa.RowMapping], int]:
            return list(connection.execute(query).mappings()), connection.execute(count).scalar_one()

        rows, total = await self._database.read(work)
        return [_record(row) for row in rows], total


def _insert(connection: sa.Connection, lines: Sequence[NewLine]) -> None:
    if lines:
        rows = [attrs.asdict(line, recurse=False) for line in lines]
        connection.execute(sa.insert(training_job_lines), rows)


def _row(record: JobRecord) -> dict[str, Any]:
    row = attrs.asdict(record, recurse=False)
    resume = None if record.resume is None else CONVERTER.unstructure(record.resume)
    return {**row, "status": record.status.value, "refs": CONVERTER.unstructure(record.refs), "resume": resume}


def _derived(record: JobRecord) -> dict[str, Any]:
    return {
        "backend": record.backend,
        "trainer_type": record.trainer_type,
        "project_ref": record.request.get("project_ref"),
    }


def _record(row: sa.RowMapping) -> JobRecord:
    values = {name: value for name, value in row.items() if name not in _DERIVED}
    resume = None if row["resume"] is None else CONVERTER.structure(row["resume"], ResumePoint)
    refs = CONVERTER.structure(row["refs"], FrozenRefs)
    return JobRecord(**{**values, "status": JobStatus(row["status"]), "refs": refs, "resume": resume})
