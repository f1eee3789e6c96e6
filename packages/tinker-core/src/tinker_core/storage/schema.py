"""Brings the schema of a part of the control database up to date, and refuses one that newer code has written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import sqlalchemy as sa

from tinker_core.errors import ConfigurationError

if TYPE_CHECKING:
    from alembic.config import Config

_LOCK = 0x74696E6B6572
"""The advisory lock of whoever upgrades a Postgres database: the letters of ``tinker``."""
_LOCK_SECONDS = 60


@attrs.frozen(kw_only=True)
class Schema:
    """Tables that one package keeps in the control database, and how they came to be."""

    package: str
    """The distribution to upgrade when the database is too new."""
    migrations: Path
    """An alembic script directory: ``env.py`` and ``versions/vNNNN_name.py``, whose revisions are the numbers."""
    version_table: str
    """Where alembic notes the revision; a name of the package's own."""

    def revisions(self) -> tuple[str, ...]:
        """All revisions that this version knows, oldest first: the numbers in the names of the migrations' files."""
        files = (self.migrations / "versions").glob("v[0-9][0-9][0-9][0-9]_*.py")
        return tuple(sorted(path.name[1:5] for path in files))

    def present_revision(self, connection: sa.Connection) -> str | None:
        """The revision of a database, None for an empty one."""
        if not sa.inspect(connection).has_table(self.version_table):
            return None
        version = sa.table(self.version_table, sa.column("version_num", sa.String))
        return connection.execute(sa.select(version.c.version_num)).scalar_one_or_none()

    def is_current(self, connection: sa.Connection) -> bool:
        """Whether there is nothing to migrate; raises `ConfigurationError` for what newer code has written."""
        known, present = self.revisions(), self.present_revision(connection)
        if present is not None and present not in known:
            raise ConfigurationError(
                f"the control database has schema {present}, which this version does not know; a newer tinker-server "
                f"wrote it: upgrade {self.package}, or choose another data directory or --database-url"
            )
        return present == known[-1]

    def migrate(self, connection: sa.Connection) -> None:
        """Run the migrations that a database lacks, all of them or none, inside the caller's transaction.

        Several servers may do so at once: with Postgres all but the first wait, and then find nothing to do. Raises
        `ConfigurationError` for a database that newer code has written.
        """
        if self.is_current(connection):
            return
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            if self.is_current(connection):
                return
        # Slow to import, and seldom needed: a server must be back within two seconds of its death.
        from alembic import command

        command.upgrade(self.alembic_config(connection), "head")

    def alembic_config(self, connection: sa.Connection) -> Config:
        """What alembic is told, to work on these tables inside the caller's transaction."""
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(self.migrations).replace("%", "%%"))
        config.attributes["connection"] = connection
        config.attributes["version_table"] = self.version_table
        return config


CONTROL = Schema(
    package="tinker-core", migrations=Path(__file__).parent / "migrations", version_table="alembic_version"
)
"""The tables of `tinker_core.storage.tables`."""
