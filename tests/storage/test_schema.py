from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from tinker_core.errors import ConfigurationError
from tinker_core.storage import ControlStore, schema
from tinker_core.storage.addresses import parse_url
from tinker_core.storage.database import open_database
from tinker_core.storage.schema import CONTROL, Schema
from tinker_core.storage.tables import metadata


def revision_of(url: str) -> str | None:
    engine = sa.create_engine(parse_url(url))
    with engine.connect() as connection:
        found = CONTROL.present_revision(connection)
    engine.dispose()
    return found


def test_the_migrations_make_exactly_the_tables_that_the_code_expects(new_database: str) -> None:
    engine = open_database(new_database)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_the_names_of_the_migrations_are_their_revisions_in_order() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    scripts = list(ScriptDirectory.from_config(config).walk_revisions())
    assert tuple(reversed([script.revision for script in scripts])) == CONTROL.revisions()


def test_a_database_of_newer_code_is_refused_and_left_alone(new_database: str) -> None:
    engine = open_database(new_database)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(ConfigurationError, match=r"9999.*newer tinker-server.*upgrade"):
        asyncio.run(ControlStore.open(new_database))
    assert revision_of(new_database) == "9999"


def test_a_migration_that_fails_leaves_nothing_behind(new_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic import op

    real = op.create_index

    def fail_late(name: str, *args: Any, **kwargs: Any) -> None:
        if "samplers" in name:
            raise sa.exc.OperationalError("CREATE INDEX", {}, Exception("disk full"))
        real(name, *args, **kwargs)

    monkeypatch.setattr(op, "create_index", fail_late)
    with pytest.raises(ConfigurationError, match="disk full"):
        open_database(new_database)
    monkeypatch.undo()
    engine = sa.create_engine(parse_url(new_database))
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()
    open_database(new_database).dispose()
    assert revision_of(new_database) == CONTROL.revisions()[-1]


def test_of_servers_that_start_at_once_one_migrates_and_all_start(
    new_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import command

    number = 3
    together = threading.Barrier(number)
    migrated = []
    real_upgrade, real_check = command.upgrade, Schema.is_current

    def upgrade(*args: Any, **kwargs: Any) -> None:
        migrated.append(threading.get_ident())
        real_upgrade(*args, **kwargs)

    checked = threading.local()

    def is_current(self: Schema, connection: sa.Connection) -> bool:
        found = real_check(self, connection)
        if connection.dialect.name == "postgresql" and not hasattr(checked, "once"):
            checked.once = True
            together.wait(60)  # all of them have seen the empty database; with SQLite only one at a time can look
        return found

    monkeypatch.setattr(command, "upgrade", upgrade)
    monkeypatch.setattr(Schema, "is_current", is_current)
    with ThreadPoolExecutor(number) as pool:
        for engine in pool.map(open_database, [new_database] * number):
            engine.dispose()
    assert len(migrated) == 1


def test_an_up_to_date_database_is_opened_without_the_migration_library(database: str) -> None:
    open_database(database).dispose()
    code = (
        "import sys\n"
        "from tinker_core.storage.database import open_database\n"
        f"open_database({database!r}).dispose()\n"
        "sys.exit(any(name.partition('.')[0] == 'alembic' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
