from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
import sqlalchemy as sa

from tests.postgres import Postgres
from tests.storage.test_control_store import CHECKPOINT, NOON, RUN, SAMPLER, SESSION, fill, with_store
from tinker_core.errors import ConfigurationError, DatabaseUnavailableError, InvalidRequestError, StorageError
from tinker_core.storage import ControlStore
from tinker_core.storage.addresses import parse_url, shown
from tinker_core.storage.database import Database
from tinker_core.types import AuditRecord, TinkerPath, UsageKind, UsageRecord

SECRET = "s3cr3t"


def with_two_stores(url: str, body: Callable[[ControlStore, ControlStore], Coroutine[Any, Any, None]]) -> None:
    """Two servers, as far as the database can tell."""

    async def main() -> None:
        stores = [await ControlStore.open(url) for _ in range(2)]
        try:
            await body(*stores)
        finally:
            for store in stores:
                await store.close()

    asyncio.run(main())


@pytest.fixture
def own_postgres(postgres: Postgres) -> Iterator[Postgres]:
    if postgres.server is None:
        pytest.skip("the Postgres of TEST_DATABASE_URL is not ours to stop")
    yield postgres
    postgres.server.stop()
    postgres.server.start()


# --- several servers on one database ----------------------------------------------------------------------------------


def test_amounts_that_two_servers_add_at_once_are_all_counted(database: str) -> None:
    usage = UsageRecord(
        kind=UsageKind.TRAINING, owner="ada", base_model="tiny", starts_at=NOON, ends_at=NOON + timedelta(hours=1),
        quantity=1,
    )  # fmt: skip
    batch = [attrs.evolve(usage, run_id=f"run-{number}") for number in range(3)]

    async def body(first: ControlStore, second: ControlStore) -> None:
        await asyncio.gather(*(store.usage.add(batch) for _ in range(20) for store in (first, second)))
        found = await first.usage.list(NOON, NOON + timedelta(hours=1))
        assert [record.quantity for record in found] == [40, 40, 40]

    with_two_stores(database, body)


def test_no_two_clones_get_one_number_whichever_server_gives_it(database: str) -> None:
    async def body(first: ControlStore, second: ControlStore) -> None:
        await first.add_sampler(SAMPLER)
        joins = (store.add_sampler_clone(SAMPLER.sampling_session_id) for _ in range(20) for store in (first, second))
        assert sorted(await asyncio.gather(*joins)) == list(range(1, 41))

    with_two_stores(database, body)


def test_of_two_servers_that_save_under_one_name_one_is_told_that_it_exists(database: str) -> None:
    async def body(first: ControlStore, second: ControlStore) -> None:
        for number in range(10):
            record = attrs.evolve(CHECKPOINT, path=TinkerPath.parse(f"tinker://run/weights/{number}"))
            results = await asyncio.gather(
                *(store.put_checkpoint(record, overwrite=False) for store in (first, second)), return_exceptions=True
            )
            assert sorted(type(result).__name__ for result in results) == ["CheckpointExistsError", "NoneType"]

    with_two_stores(database, body)


def test_reading_does_not_wait_for_another_servers_writing(postgres: Postgres) -> None:
    async def body(first: ControlStore, second: ControlStore) -> None:
        await first.add_session(SESSION)
        database: Database = second._database
        reading, written = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(connection: sa.Connection) -> None:
            connection.execute(sa.text("UPDATE sessions SET display_name = 'new'"))
            loop.call_soon_threadsafe(reading.set)
            asyncio.run_coroutine_threadsafe(written.wait(), loop).result()

        writing = asyncio.create_task(database.write(slow))
        await reading.wait()
        before = await second.get_session("s1")
        written.set()
        await writing
        after = await second.get_session("s1")
        assert before is not None
        assert after is not None
        assert (before.display_name, after.display_name) == ("a session", "new")

    with_two_stores(postgres.emptied(), body)


def test_what_only_reads_cannot_write(postgres: Postgres) -> None:
    async def body(store: ControlStore) -> None:
        with pytest.raises(StorageError, match="read-only"):
            await store._database.read(lambda connection: connection.execute(sa.text("DELETE FROM sessions")))

    with_store(postgres.emptied(), body)


# --- a database that goes and comes -----------------------------------------------------------------------------------


def test_a_database_that_was_restarted_is_used_again_with_all_that_was_kept(own_postgres: Postgres) -> None:
    assert own_postgres.server is not None

    async def body(store: ControlStore) -> None:
        await fill(store)
        own_postgres.server.stop()
        for work in (store.get_session("s1"), store.add_run(attrs.evolve(RUN, model_id="lost"))):
            with pytest.raises(DatabaseUnavailableError, match="try again"):
                await work
        own_postgres.server.start()
        assert await store.get_session("s1") == SESSION
        assert await store.get_run("lost") is None
        await store.add_run(attrs.evolve(RUN, model_id="after"))
        own_postgres.server.stop()  # all its connections are dead when it is asked next
        own_postgres.server.start()
        assert await store.list_run_ids("s1") == [RUN.model_id, "after"]

    with_store(own_postgres.emptied(), body)


def test_work_whose_connection_ends_in_the_middle_is_done_again(postgres: Postgres) -> None:
    async def body(store: ControlStore) -> None:
        pids = []

        def work(connection: sa.Connection) -> None:
            pids.append(connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one())
            connection.execute(sa.text("UPDATE sessions SET display_name = display_name || '!'"))
            if len(pids) == 1:
                connection.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))

        await store.add_session(SESSION)
        await store._database.write(work)
        assert len(set(pids)) == 2
        found = await store.get_session("s1")
        assert found is not None
        assert found.display_name == "a session!"

    with_store(postgres.emptied(), body)


def test_a_statement_that_takes_too_long_is_given_up(postgres: Postgres) -> None:
    url = f"{postgres.emptied()}&options=-c%20statement_timeout%3D50ms"

    async def body(store: ControlStore) -> None:
        with pytest.raises(StorageError, match="statement timeout"):
            await store._database.read(lambda connection: connection.execute(sa.text("SELECT pg_sleep(60)")))

    with_store(url, body)


# --- what texts may hold ----------------------------------------------------------------------------------------------

BAD_TEXTS = ["a\0b", "\ud800", "x\udfff"]


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_text_that_cannot_be_kept_or_looked_for_is_the_callers_mistake(database: str, text: str) -> None:
    async def body(store: ControlStore) -> None:
        for work in (
            store.add_session(attrs.evolve(SESSION, display_name=text)),
            store.get_session(text),
            store.list_sessions(text, 1, 0),
            store.touch_run(text, NOON),
        ):
            with pytest.raises(InvalidRequestError, match="NUL"):
                await work
        assert await store.list_sessions("ada", None, 0) == ([], 0)

    with_store(database, body)


def test_json_holds_any_text_and_no_number_that_is_none(database: str) -> None:
    metadata = {"nul": "a\0b", "half": "\ud83d", "é": ["\U0001f600", 2**63, 1e308, -0.0]}

    async def body(store: ControlStore) -> None:
        record = attrs.evolve(SESSION, user_metadata=metadata, tags=("a\0b",))
        await store.add_session(record)
        assert await store.get_session("s1") == record
        with pytest.raises(InvalidRequestError, match="JSON"):
            await store.add_session(attrs.evolve(SESSION, session_id="s2", user_metadata={"x": float("nan")}))

    with_store(database, body)


def test_names_differ_by_case_and_wildcards_are_letters(database: str) -> None:
    names = ["step", "Step", "STEP", "st_p", "st.p", "stxp"]

    async def body(store: ControlStore) -> None:
        for name in names:
            for kind in ("weights", "sampler_weights"):
                path = TinkerPath.parse(f"tinker://Weights%_:train:{name}/{kind}/{name}")
                await store.put_checkpoint(attrs.evolve(CHECKPOINT, path=path, expires_at=None), overwrite=False)
        for name in names:
            run_id = f"Weights%_:train:{name}"
            newest = await store.checkpoint_queries.newest("ada", [run_id], NOON)
            assert [record.path.kind.value for record in newest[run_id]] == ["sampler_weights", "weights"]

    with_store(database, body)


def test_large_numbers_and_far_times_are_kept(database: str) -> None:
    far = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    early = datetime(1, 1, 1, tzinfo=UTC)

    async def body(store: ControlStore) -> None:
        record = attrs.evolve(CHECKPOINT, size_bytes=2**63 - 1, created_at=early, expires_at=far)
        await store.put_checkpoint(record, overwrite=False)
        assert await store.get_checkpoint(CHECKPOINT.path) == record
        assert await store.checkpoint_queries.next_expiry() == far
        entry = AuditRecord(recorded_at=far, category="projects", event="x", owner="ada", details={"n": 2**70})
        await store.audit.add([entry])
        assert await store.audit.list("ada", early, far) == []

    with_store(database, body)


# --- URLs -------------------------------------------------------------------------------------------------------------


def test_sqlite_keeps_a_write_ahead_log(tmp_path: Path) -> None:
    with_store(f"sqlite:///{tmp_path / 'control.sqlite'}", fill)
    with sqlite3.connect(tmp_path / "control.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_usual_way_to_write_a_postgres_url_means_the_one_driver(scheme: str) -> None:
    url = parse_url(f"{scheme}://ada:{SECRET}@db.example:6432/tinker?sslmode=require")
    assert url.drivername == "postgresql+psycopg"
    assert url.password == SECRET
    assert shown(url) == "postgresql+psycopg://ada@db.example:6432/tinker"


@pytest.mark.parametrize(
    "bad",
    [
        "sqlite:////no/such/directory/x.sqlite3",
        f"not a url {SECRET}",
        f"nosuchdialect://ada:{SECRET}@host/name",
        f"postgresql+psycopg2://ada:{SECRET}@host/name",
        f"mysql://ada:{SECRET}@host/name",
        f"postgresql://ada:pass:{SECRET}@host:port{SECRET}/name",
        f"postgresql://ada:{SECRET}@/name?host=/no/such/directory",
        f"postgresql://ada@/name?host=/no/such/directory&password={SECRET}",
        f"postgresql://ada@/name?host=/no/such/directory&passwort={SECRET}",
    ],
)
def test_a_database_that_cannot_be_opened_is_named_without_its_password(
    bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigurationError, match="control database") as caught:
        asyncio.run(ControlStore.open(bad))
    shown_to_somebody = [str(caught.value), str(caught.value.__cause__), caplog.text]
    assert not [text for text in shown_to_somebody if SECRET in text]


def test_a_database_of_postgres_that_does_not_exist_is_named(postgres: Postgres) -> None:
    url = postgres.emptied().replace("tinker_test_", "nosuch_")
    with pytest.raises(ConfigurationError, match=r"nosuch.*does not exist.*check that it runs"):
        asyncio.run(ControlStore.open(url))
