"""Brings the control database's schema up to date, and refuses one that newer code has written."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from tinker_core.errors import ConfigurationError

_MIGRATIONS = Path(__file__).parent / "migrations"
_VERSION = sa.table("alembic_version", sa.column("version_num", sa.String))
_LOCK = 0x74696E6B6572
"""The advisory lock of whoever upgrades a Postgres database: the letters of ``tinker``."""
_LOCK_SECONDS = 60


def revisions() -> tuple[str, ...]:
    """All revisions that this version knows, oldest first: the numbers in the names of the migrations' files."""
    return tuple(sorted(path.name[1:5] for path in (_MIGRATIONS / "versions").glob("v[0-9][0-9][0-9][0-9]_*.py")))


def present_revision(connection: sa.Connection) -> str | None:
    """The revision of a database, None for an empty one."""
    if not sa.inspect(connection).has_table(_VERSION.name):
        return None
    return connection.execute(sa.select(_VERSION.c.version_num)).scalar_one_or_none()


def is_current(connection: sa.Connection) -> bool:
    """Whether there is nothing to migrate. Raises `ConfigurationError` for a database that newer code has written."""
    known, present = revisions(), present_revision(connection)
    if present is not None and present not in known:
        raise ConfigurationError(
            f"the control database has schema {present}, which this version does not know; "
            "a newer tinker-server wrote it: upgrade tinker-core, or choose another data directory or --database-url"
        )
    return present == known[-1]


def migrate(connection: sa.Connection) -> None:
    """Run the migrations that a database lacks, all of them or none, inside the caller's transaction.

    Several servers may do so at once: with Postgres all but the first wait, and then find nothing to do. Raises
    `ConfigurationError` for a database that newer code has written.
    """
    if is_current(connection):
        return
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        if is_current(connection):
            return
    # Slow to import, and seldom needed: a server must be back within two seconds of its death.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
