"""The journal's database: tables, format version and connections."""

from __future__ import annotations

import functools
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tinker_core.errors import ConfigurationError

FORMAT_VERSION = 1
DATABASE = "journal.sqlite"

PENDING = "pending"
INLINE = 1
IN_FILE = 2

_OLDEST_SQLITE = (3, 35, 0)
_CACHE_BYTES = 32 * 1024 * 1024
_LOG_BYTES = 64 * 1024 * 1024
"""What is left of the write-ahead log after it had to grow beyond."""

_TABLES = """
CREATE TABLE meta (version INTEGER NOT NULL, journal_id BLOB NOT NULL);
CREATE TABLE totals (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    epoch INTEGER NOT NULL, commits INTEGER NOT NULL, live INTEGER NOT NULL, live_sum INTEGER NOT NULL,
    body_bytes INTEGER NOT NULL, result_bytes INTEGER NOT NULL, file_bytes INTEGER NOT NULL,
    pending INTEGER NOT NULL, results INTEGER NOT NULL
);
CREATE TABLE requests (
    number INTEGER PRIMARY KEY, scope_hash INTEGER NOT NULL, place INTEGER NOT NULL, scope TEXT NOT NULL,
    owner TEXT NOT NULL, chk INTEGER NOT NULL, head BLOB NOT NULL
);
CREATE INDEX requests_key ON requests (scope_hash, place);
CREATE TABLE live (
    number INTEGER PRIMARY KEY, model_id TEXT, seq_id INTEGER, grp TEXT, state TEXT NOT NULL,
    body INTEGER NOT NULL, body_size INTEGER NOT NULL, body_chk INTEGER NOT NULL,
    chk INTEGER NOT NULL, attempts INTEGER NOT NULL
);
CREATE INDEX live_model ON live (model_id, seq_id) WHERE model_id IS NOT NULL;
CREATE INDEX live_group ON live (grp) WHERE grp IS NOT NULL;
CREATE TABLE bodies (number INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE results (
    number INTEGER PRIMARY KEY, owner TEXT NOT NULL, keep_until REAL NOT NULL,
    stored INTEGER NOT NULL, size INTEGER NOT NULL, chk INTEGER NOT NULL
);
CREATE INDEX results_time ON results (keep_until);
CREATE INDEX results_owner ON results (owner, number);
CREATE TABLE payloads (number INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE owners (owner TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE models (
    model_id TEXT PRIMARY KEY, next_seq_id INTEGER NOT NULL, chk INTEGER NOT NULL, state BLOB NOT NULL
);
"""
"""``live`` holds the requests that are not done with: without a result, or with a body or place that is still needed.
It stays small however many results wait to be fetched, and the sum of its checksums is kept in ``totals``.
Payloads are apart from the rows that change."""


def connect(path: Path) -> sqlite3.Connection:
    """A connection for one thread at a time, without implicit transactions.

    Text that is not UTF-8 any more is read with replacements, so that it fails its record's checksum and nothing else.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise ConfigurationError(f"the journal needs SQLite 3.35 or newer, this Python has {sqlite3.sqlite_version}")
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60, cached_statements=256)
    connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA fullfsync=1")
    # Some builds overwrite what is deleted: that would write every body twice.
    connection.execute("PRAGMA secure_delete=OFF")
    connection.execute(f"PRAGMA cache_size=-{_CACHE_BYTES // 1024}")
    connection.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
    return connection


def has_tables(connection: sqlite3.Connection) -> bool:
    """Whether the database is one already, of whatever version."""
    (count,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(count)


def create_tables(connection: sqlite3.Connection) -> None:
    """Make an empty database a journal."""
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("BEGIN IMMEDIATE")
    for statement in _TABLES.split(";"):
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES (?, ?)", (FORMAT_VERSION, secrets.token_bytes(16)))
    connection.execute("INSERT INTO totals VALUES (1, 0, 0, 0, 0, 0, 0, 0, 0, 0)")
    connection.execute("COMMIT")


def check_version(connection: sqlite3.Connection) -> bytes:
    """The journal's own id; raises `ConfigurationError` for a format that this version does not know."""
    version, journal_id = connection.execute("SELECT version, journal_id FROM meta").fetchone()
    if version != FORMAT_VERSION:
        raise ConfigurationError(
            f"the journal has format {version}, this version of the server knows format {FORMAT_VERSION}; "
            "start the version that wrote it, or let that version finish all work and use another data directory"
        )
    return bytes(journal_id)


Value = int | float | str | bytes | None

_CHUNKS = (256, 64, 16, 4, 1)
"""Rows of one statement. Few sizes, so that statements stay prepared; many rows, because each statement gives up the
interpreter's lock, and a busy event loop may keep it for milliseconds."""


def _chunked(values: Sequence[object]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in _CHUNKS:
        while len(values) - start >= size:
            yield start, size
            start += size


def insert(
    connection: sqlite3.Connection,
    into: str,
    rows: Sequence[tuple[Value, ...]],
    *,
    verb: str = "INSERT",
    then: str = "",
) -> None:
    """Insert rows; ``verb`` and ``then`` may say what happens to those that exist."""
    for start, size in _chunked(rows):
        part = rows[start : start + size]
        row = f"({','.join('?' * len(part[0]))})"
        sql = f"{verb} INTO {into} VALUES {','.join([row] * size)} {then}"
        connection.execute(sql, [value for values in part for value in values])


def keys(values: Iterable[Value]) -> list[tuple[Value, ...]]:
    """Single values as rows."""
    return [(value,) for value in values]


def select(connection: sqlite3.Connection, sql: str, rows: Iterable[tuple[Value, ...]]) -> list[tuple[Value, ...]]:
    """What a query finds for any number of rows, which take the place of its ``IN (?)`` or ``VALUES (?,?)``."""
    found: list[tuple[Value, ...]] = []
    for statement, values in _statements(sql, list(rows)):
        found += connection.execute(statement, values).fetchall()
    return found


def change(connection: sqlite3.Connection, sql: str, rows: Iterable[tuple[Value, ...]]) -> int:
    """Run a change for any number of rows as `select` does; returns how many rows it changed."""
    return sum(connection.execute(statement, values).rowcount for statement, values in _statements(sql, list(rows)))


def _statements(sql: str, rows: Sequence[tuple[Value, ...]]) -> Iterator[tuple[str, list[Value]]]:
    for start, size in _chunked(rows):
        part = rows[start : start + size]
        filled = sql.replace("IN (?)", f"IN ({','.join('?' * size)})")
        filled = filled.replace("VALUES (?,?)", f"VALUES {','.join(['(?,?)'] * size)}")
        yield filled, [value for row in part for value in row]
