"""Opens the control database and brings its schema up to date."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from tinker_core.errors import ConfigurationError

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_MILLISECONDS = 10_000
"""How long a transaction waits for another process's."""


def database_url(data_dir: Path) -> str:
    """Where a data directory keeps its control database."""
    return f"sqlite:///{data_dir / 'control.sqlite'}"


def open_database(url: str) -> sa.Engine:
    """An engine on an up-to-date database, which is created if it does not exist.

    Raises `ConfigurationError` for a URL that cannot be opened and for a database that newer code has written.
    """
    try:
        engine = sa.create_engine(url, hide_parameters=True)
    except (sa.exc.ArgumentError, ImportError) as error:
        raise ConfigurationError(f"control database URL {url!r} cannot be used: {error}") from error
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    try:
        with engine.begin() as connection:
            migrate(connection)
    except sa.exc.SQLAlchemyError as error:
        engine.dispose()
        raise ConfigurationError(
            f"control database {url!r} cannot be opened: {error}; check that its directory exists and is writable"
        ) from error
    except ConfigurationError:
        engine.dispose()
        raise
    return engine


def migrate(connection: sa.Connection) -> None:
    """Run the migrations that a database lacks, all of them or none, inside the caller's transaction."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    present = set(MigrationContext.configure(connection).get_current_heads())
    if not present <= known:
        raise ConfigurationError(
            f"the control database has schema {', '.join(sorted(present - known))}, which this version does not know; "
            "a newer tinker-server wrote it: upgrade tinker-core, or choose another data directory"
        )
    command.upgrade(config, "head")


def _set_up_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # The driver opens no transaction around DDL; with its own handling off, BEGIN below covers migrations too.
    assert isinstance(connection, sqlite3.Connection)
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # `tinker-server keys` may write beside a running server. A transaction that begins by reading cannot become a
    # writing one once somebody else wrote in between, so each takes the writer's place at once, and waits for it.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
