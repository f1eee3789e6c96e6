"""Jobs and their logs in the control database, of each kind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import attrs
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tests.jobs.workers import make_refs
from tinker_core.errors import ConfigurationError
from tinker_core.storage.database import Database
from tinker_jobs.errors import UnknownJobError
from tinker_jobs.protocol import ResumePoint
from tinker_jobs.records import JobRecord, JobStatus, LogRecord
from tinker_jobs.refs import FrozenDataset, FrozenFile, FrozenTask
from tinker_jobs.service.store import JobStore, NewLine
from tinker_jobs.service.tables import SCHEMA, metadata

NOW = datetime(2026, 1, 1, tzinfo=UTC)
_T = TypeVar("_T")


def use(url: str, work: Callable[[JobStore], Awaitable[_T]]) -> _T:
    """Do something with a store that is opened for that."""

    async def run() -> _T:
        database = await Database.open(url)
        try:
            return await work(await JobStore.open(database))
        finally:
            await database.close()

    return asyncio.run(run())


def job(job_id: str = "one", *, owner: str = "ann", minutes: int = 0, **fields: Any) -> JobRecord:
    request = {"backend": "tinker", "trainer_type": "sft", "model": "m", "config": {"steps": 3}}
    values: dict[str, Any] = {
        "job_id": job_id,
        "owner": owner,
        "key_id": None,
        "server_id": "here",
        "status": JobStatus.QUEUED,
        "request": request,
        "refs": make_refs(),
        "base_model": "m",
        "created_at": NOW + timedelta(minutes=minutes),
    }
    return JobRecord(**{**values, **fields})


def line(record: JobRecord, message: str, event_type: str = "log", **fields: Any) -> NewLine:
    return NewLine(
        job_id=record.job_id,
        owner=record.owner,
        project_id=record.project_id,
        timestamp=NOW,
        event_type=event_type,
        level="info",
        message=message,
        **fields,
    )


def test_the_migrations_make_exactly_the_tables_that_the_code_expects(database: str) -> None:
    def compare(connection: sa.Connection) -> list[Any]:
        options = {
            "compare_type": True,
            "version_table": SCHEMA.version_table,
            "include_name": lambda name, kind, _: kind != "table" or name in metadata.tables,
        }
        context = MigrationContext.configure(connection, opts=options)
        found: list[Any] = compare_metadata(context, metadata)
        return found

    assert use(database, lambda store: store._database.read(compare)) == []


def test_tables_of_newer_code_are_refused(database: str) -> None:
    async def age(store: JobStore) -> None:
        statement = sa.text(f"UPDATE {SCHEMA.version_table} SET version_num = '9999'")
        await store._database.write(lambda connection: connection.execute(statement))

    use(database, age)
    with pytest.raises(ConfigurationError, match=r"9999.*upgrade tinker-jobs"):
        use(database, lambda store: store.list("ann"))


def test_a_job_comes_back_as_it_was(database: str) -> None:
    file = FrozenFile(path="/d/train.jsonl", size_bytes=7, sha256="00")
    dataset = FrozenDataset(name="d", version="1.0.0", splits={"train": file}, default_split="train")
    task = FrozenTask(name="t", version="2.0.0", content={"instruction": "Say {{ x }}", "ports": {"a": 1}})
    record = job(
        key_id="key-1",
        status=JobStatus.RUNNING,
        refs=make_refs(dataset=dataset, trajectory_datasets=(dataset,), task=task),
        started_at=NOW,
        cancel_requested_at=NOW,
        completed_at=NOW,
        error="why",
        attempt=2,
        num_retries=1,
        run_key_id="key-2",
        metrics={"steps": [1, 2], "train/loss": [1.5, None]},
        artifacts={"checkpoints": ["tinker://x"]},
        resume=ResumePoint(step=2, state_path="tinker://s", extra={"used": [1]}),
        project_id="thesis",
    )
    use(database, lambda store: store.add(record))
    assert use(database, lambda store: store.get("one", "ann")) == record


def test_a_job_is_nobody_elses(database: str) -> None:
    use(database, lambda store: store.add(job()))
    for job_id, owner in (("one", "ben"), ("two", "ann")):
        with pytest.raises(UnknownJobError):
            use(database, lambda store, job_id=job_id, owner=owner: store.get(job_id, owner))  # type: ignore[misc]
    assert use(database, lambda store: store.list("ben")) == ([], 0)
    with pytest.raises(UnknownJobError):
        use(database, lambda store: store.update(job("two")))


def test_jobs_are_listed_newest_first_in_pages_and_by_what_they_are(database: str) -> None:
    ray = {"backend": "ray", "trainer_type": "rl", "model": "m", "config": {}, "project_ref": "apollo"}
    jobs = [job(str(n), minutes=n // 2) for n in range(4)]
    jobs.append(job("4", minutes=4, request=ray, status=JobStatus.FAILED))

    async def work(store: JobStore) -> list[tuple[list[str], int]]:
        for record in jobs:
            await store.add(record)
        wanted: list[dict[str, Any]] = [
            {},
            {"page": 2, "page_size": 2},
            {"page": 9},
            {"status": "failed"},
            {"status": "pending"},
            {"backend": "tinker", "trainer_type": "sft"},
            {"project_ref": "apollo"},
        ]
        found = [await store.list("ann", **filters) for filters in wanted]
        return [([record.job_id for record in page], total) for page, total in found]

    everything = ["4", "3", "2", "1", "0"]  # of the same minute, the later one is newer
    assert use(database, work) == [
        (everything, 5),
        (["2", "1"], 5),
        ([], 5),
        (["4"], 1),
        ([], 0),
        (everything[1:], 4),
        (["4"], 1),
    ]


def test_a_log_is_read_from_anywhere_and_kept_with_what_it_tells_of(database: str) -> None:
    one, two = job("one"), job("two")

    async def work(store: JobStore) -> None:
        await store.add(one, [line(one, "queued", "queued")])
        await store.add(two)
        mixed = [
            line(one, "a", data={"x": "\0"}),
            line(two, "b"),
            line(one, "c", "step_complete", metrics={"l": [1.5]}),
        ]
        await store.append(mixed)
        ended = attrs.evolve(one, status=JobStatus.COMPLETED, metrics={"l": [1.5]})
        await store.update(ended, [line(one, "d", "checkpoint_saved", resume_step=3)])
        assert await store.get("one", "ann") == ended
        lines = await store.logs("one")
        assert [found.message for found in lines] == ["queued", "a", "c", "d"]
        assert lines[1:] == await store.logs("one", after=lines[0].number)
        assert lines[:2] == await store.logs("one", limit=2)
        assert [found.number for found in lines] == sorted({found.number for found in lines})
        expected = LogRecord(
            number=lines[2].number,
            timestamp=NOW,
            level="info",
            message="c",
            data={},
            event_type="step_complete",
            metrics={"l": [1.5]},
        )
        assert lines[2] == expected
        assert lines[1].data == {"x": "\0"}
        assert [found.message for found in await store.reports("one")] == ["queued", "c", "d"]
        assert lines[3].resume_step == 3

    use(database, work)


def test_a_server_finds_what_it_left_unfinished(database: str) -> None:
    jobs = [
        job("queued"),
        job("running", status=JobStatus.RUNNING),
        job("done", status=JobStatus.COMPLETED),
        job("with key", status=JobStatus.FAILED, run_key_id="key-1"),
        job("elsewhere", server_id="there"),
    ]

    async def work(store: JobStore) -> list[str]:
        for record in jobs:
            await store.add(record)
        return [record.job_id for record in await store.unfinished("here")]

    assert use(database, work) == ["queued", "running", "with key"]


def test_two_servers_open_the_tables_of_one_database_at_once(database: str) -> None:
    async def work() -> None:
        databases = [await Database.open(database) for _ in range(2)]
        try:
            first, second = await asyncio.gather(*map(JobStore.open, databases))
            await asyncio.gather(first.add(job("one")), second.add(job("two", minutes=1)))
            assert (await first.list("ann"))[1] == (await second.list("ann"))[1] == 2
        finally:
            for one in databases:
                await one.close()

    asyncio.run(work())
