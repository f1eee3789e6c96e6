"""Opens the control database: an up-to-date schema, and who may talk to it how."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import attrs
import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from tinker_core.errors import ConfigurationError
from tinker_core.storage.addresses import database_url, parse_url, shown
from tinker_core.storage.columns import to_json
from tinker_core.storage.schema import CONTROL, Schema
from tinker_core.storage.tables import metadata
from tinker_core.storage.transactions import run_transaction, words_of

__all__ = ["Database", "database_url", "look_at_database", "open_database"]

_T = TypeVar("_T")

_BUSY_MILLISECONDS = 10_000
"""How long an SQLite transaction waits for another process's."""
_READERS = 3
"""Connections to Postgres on which records are read, beside the one on which they are written."""
_POSTGRES_SETTINGS = {
    "statement_timeout": "30s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "60s",
    "timezone": "UTC",
}
_POSTGRES_CONNECTION = {
    "application_name": "tinker-server",
    "connect_timeout": 5,
    # A database host that vanished without a word is given up after ten seconds instead of two hours.
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""What the URL's own options, such as ``?connect_timeout=20``, take the place of."""


@attrs.frozen(kw_only=True)
class Database:
    """An open control database and the threads that talk to it.

    All that may write runs one after the other on one thread: a server never gets in its own way, and what it wrote
    keeps its order. With SQLite all that reads runs there as well. With Postgres reading has threads of its own, for
    there every statement waits for a network, and transactions are serializable: what one of them has read is still
    true when it writes, whatever other servers do. One that would break that is rolled back, and done again alone.
    """

    plain: sa.Engine
    """Unlike on the two below, with Postgres every statement sees what others have committed by then."""
    writing: sa.Engine
    reading: sa.Engine
    writer: ThreadPoolExecutor
    readers: ThreadPoolExecutor
    server_id: str | None = None
    """The server that asks, which looks after its own records only; None is somebody who makes no difference."""
    alone: str | None = None
    """What to say first to keep all other servers from writing until the transaction ends."""

    @classmethod
    async def open(cls, url: str, server_id: str | None = None) -> Database:
        """Open the database at a URL; raises `ConfigurationError` like `open_database`."""
        writer = _threads("control-store", 1)
        try:
            engine = await asyncio.get_running_loop().run_in_executor(writer, open_database, url)
        except BaseException:
            writer.shutdown(wait=False)
            raise
        if engine.dialect.name == "sqlite":
            return cls(plain=engine, writing=engine, reading=engine, writer=writer, readers=writer, server_id=server_id)
        return cls(
            plain=engine.execution_options(isolation_level="READ COMMITTED"),
            server_id=server_id,
            writing=engine.execution_options(isolation_level="SERIALIZABLE"),
            reading=engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True),
            writer=writer,
            readers=_threads("control-reader", _READERS),
            # Unlike a query, this is no part of what a transaction has seen: it sees what is there once it has begun.
            alone=_alone(metadata),
        )

    async def write(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Do some work in one transaction, after all other writing; see `run_transaction`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.writer, run_transaction, self.writing, work, self.alone)

    async def read(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Do some work that only reads, on one state of the database; see `run_transaction`."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, run_transaction, self.reading, work)

    async def migrate(self, schema: Schema) -> None:
        """Bring a package's own tables up to date; raises `ConfigurationError` for what newer code has written."""
        # Who waited for another server's migrations must see them: an isolated transaction would not.
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.writer, run_transaction, self.plain, schema.migrate)

    def of_tables(self, tables: sa.MetaData) -> Database:
        """The same database for the sake of a package's own tables, which are in nobody else's way."""
        return attrs.evolve(self, alone=None if self.alone is None else _alone(tables))

    async def close(self) -> None:
        """Finish what is running and close all connections."""
        await asyncio.to_thread(self.readers.shutdown)
        await asyncio.to_thread(self.writer.shutdown)
        await asyncio.to_thread(self.writing.dispose)


def _alone(tables: sa.MetaData) -> str:
    return f"LOCK TABLE {', '.join(tables.tables)} IN SHARE ROW EXCLUSIVE MODE"


def _threads(name: str, number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=number, thread_name_prefix=name)


def open_database(url: str) -> sa.Engine:
    """An engine on an up-to-date database, which is created if it is an SQLite file that does not exist.

    Raises `ConfigurationError` for a URL that cannot be used, for a database that cannot be opened, and for one that
    newer code has written.
    """
    address = parse_url(url)
    engine = _make_engine(address)
    # Who waited for another server's migrations must see them: an isolated transaction would not.
    migrating = engine if _is_sqlite(address) else engine.execution_options(isolation_level="READ COMMITTED")
    try:
        with migrating.begin() as connection:
            CONTROL.migrate(connection)
    except sa.exc.SQLAlchemyError as error:
        engine.dispose()
        hint = "its directory exists and is writable" if _is_sqlite(address) else "it runs and lets this user in"
        raise ConfigurationError(
            f"control database {shown(address)!r} cannot be opened: {words_of(error)}; check that {hint}"
        ) from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def look_at_database(url: str) -> str | None:
    """The revision of a database's schema, which is not changed; None for an empty one.

    Raises `ConfigurationError` for a URL that cannot be used and for a database that cannot be opened.
    """
    address = parse_url(url)
    engine = _make_engine(address)
    try:
        with engine.connect() as connection:
            return CONTROL.present_revision(connection)
    except sa.exc.SQLAlchemyError as error:
        raise ConfigurationError(f"control database {shown(address)!r} cannot be opened: {words_of(error)}") from error
    finally:
        engine.dispose()


def _is_sqlite(address: sa.URL) -> bool:
    return address.get_backend_name() == "sqlite"


def _make_engine(address: sa.URL) -> sa.Engine:
    options: dict[str, Any] = {"hide_parameters": True, "json_serializer": to_json}
    if not _is_sqlite(address):
        # Connections are tried before each use: after a restart of the database the first to notice is nobody's work.
        options |= {"pool_size": _READERS + 1, "max_overflow": 0, "pool_pre_ping": True}
        options["connect_args"] = _postgres_arguments(address)
    try:
        engine = sa.create_engine(address, **options)
    except ImportError as error:
        raise ConfigurationError(
            f"control database {shown(address)!r} needs a driver that is not installed; "
            "run pip install 'tinker-core[postgres]'"
        ) from error
    if _is_sqlite(address):
        sa.event.listen(engine, "connect", _set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _postgres_arguments(address: sa.URL) -> dict[str, Any]:
    own = {name: value for name, value in _POSTGRES_CONNECTION.items() if name not in address.query}
    given = address.query.get("options", ())
    settings = [f"-c {name}={value}" for name, value in _POSTGRES_SETTINGS.items()]
    return {**own, "options": " ".join([*settings, *([given] if isinstance(given, str) else given)])}


def _set_up_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # The driver opens no transaction around DDL; with its own handling off, BEGIN below covers migrations too.
    assert isinstance(connection, sqlite3.Connection)
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}")  # first: the next line may meet another process
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _begin_sqlite(connection: sa.Connection) -> None:
    # `tinker-server keys` may write beside a running server. A transaction that begins by reading cannot become a
    # writing one once somebody else wrote in between, so each takes the writer's place at once, and waits for it.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
