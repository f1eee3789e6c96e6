"""Opening a journal: what an earlier process left is verified before anything of it is used."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

from tinker_core.errors import JournalError, JournalFullError
from tinker_core.storage.journal.checks import BODY
from tinker_core.storage.journal.disk import OutOfSpaceError, out_of_space
from tinker_core.storage.journal.recovery import damaged_rows
from tinker_core.storage.journal.reserve import Reserve
from tinker_core.storage.journal.schema import (
    DATABASE,
    IN_FILE,
    check_version,
    connect,
    create_tables,
    has_tables,
)
from tinker_core.storage.journal.side_files import SideFiles
from tinker_core.storage.journal.tail import Tail, Witness, create_tail, read_tail
from tinker_core.storage.journal.totals import Totals
from tinker_core.storage.journal.wal import wal_damage
from tinker_core.storage.local_files import sync

log = logging.getLogger(__name__)

TAIL = "tail"
_FILES = "files"
_RESERVE = "reserve"
_CHECKED_BYTES = 32 * 1024 * 1024
"""A database up to this size is checked as a whole at each start, which takes up to half a second."""


@attrs.frozen(kw_only=True)
class Opened:
    """The open files of a journal, for its writer."""

    path: Path
    connection: sqlite3.Connection
    files: SideFiles
    tail: Tail
    reserve: Reserve
    has_room: bool
    """Whether the reserve is held and there is room beside it."""
    totals: Totals
    covered: Mapping[str, int]
    """How far the models' snapshots reach."""
    owners: Mapping[str, int]
    """Bytes of results by owner."""

    def close(self) -> None:
        """Close them."""
        self.connection.close()
        self.tail.close()


def open_journal(directory: Path, *, reserve_bytes: int) -> Opened:
    """Open or create a journal. Blocking.

    Raises `JournalError` for one that is damaged, `ConfigurationError` for a format that this version does not know,
    `JournalFullError` if the disk is too full even with the reserve given away.
    """
    reserve = Reserve(directory / _RESERVE, reserve_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    files = SideFiles(directory / _FILES)
    try:
        with out_of_space(directory):
            return _open(directory, files, reserve)
    except OutOfSpaceError:
        log.warning("the disk of the journal is full; opening it again without the reserve")
        reserve.release()
    try:
        with out_of_space(directory):
            return _open(directory, files, reserve)
    except OutOfSpaceError as error:
        raise JournalFullError(f"the journal cannot be opened: {error}; free room on its disk") from error


def _open(directory: Path, files: SideFiles, reserve: Reserve) -> Opened:
    path = directory / DATABASE
    files.directory.mkdir(exist_ok=True)
    witness = _witness(directory)
    if witness is None and not path.exists():
        create_tail(directory / TAIL)
        witness = read_tail(directory / TAIL)
    sync(directory)
    sync(directory.parent)
    with contextlib.ExitStack() as stack, _named(path):
        connection = stack.enter_context(contextlib.closing(connect(path)))
        journal_id = _verified(connection, path, witness)
        totals = _begin_epoch(connection)
        if witness is None:
            create_tail(directory / TAIL)
        tail = stack.enter_context(contextlib.closing(Tail(directory / TAIL, journal_id)))
        tail.write(totals.commits)
        tail.sync()
        _sweep(connection, files)
        opened = Opened(
            path=path,
            connection=connection,
            files=files,
            tail=tail,
            reserve=reserve,
            has_room=reserve.build(),
            totals=totals,
            covered=dict(connection.execute("SELECT model_id, next_seq_id FROM models").fetchall()),
            owners=dict(connection.execute("SELECT owner, bytes FROM owners").fetchall()),
        )
        stack.pop_all()
        return opened


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Convert what SQLite says of a broken database; a full disk stays what it is."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _refusal(path, str(error)) from error
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise
        raise JournalError(f"the journal {str(path)!r} cannot be opened: {error}") from error
    except sqlite3.DatabaseError as error:
        raise _refusal(path, str(error)) from error


def _refusal(path: Path, reason: str) -> JournalError:
    return JournalError(
        f"the journal {str(path)!r} is damaged: {reason}. Restore its whole directory from a backup; or move it away, "
        "which loses every request, result and live model in it, but no checkpoint"
    )


def _lost(path: Path, reason: str) -> JournalError:
    return JournalError(
        f"the journal {str(path)!r} has lost what it had promised to keep: {reason}. Restore its whole directory from "
        f"a backup; or remove {str(path.parent / TAIL)!r}, which starts with what is left and loses "
        "acknowledged requests and results"
    )


def _witness(directory: Path) -> Witness | None:
    """The witness of the last process, or None if there is none; refuses a damaged log that it vouches for."""
    path = directory / DATABASE
    try:
        witness = read_tail(directory / TAIL)
    except ValueError as error:
        raise _lost(
            path, f"{str(directory / TAIL)!r} cannot be used, {error}, so how far it had got is unknown"
        ) from error
    log_path = path.with_name(f"{path.name}-wal")
    if witness is not None and (damage := wal_damage(log_path)):
        raise _lost(path, f"{str(log_path)!r}: {damage}")
    return witness


def _verified(connection: sqlite3.Connection, path: Path, witness: Witness | None) -> bytes:
    """Let SQLite recover, and compare what there is with what was promised; returns the journal's id."""
    claimed = witness is not None and witness.commits > 0
    if not has_tables(connection):
        if claimed:
            raise _lost(path, "it is empty or missing")
        create_tables(connection)
    journal_id = check_version(connection)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    commits = Totals.read(connection).commits
    if witness is not None and claimed:
        if witness.journal_id != journal_id:
            raise _lost(path, f"it is not the journal that {TAIL!r} belongs to")
        if witness.commits > commits:
            raise _lost(path, f"it ends at transaction {commits}, and transaction {witness.commits} was durable")
    acknowledged = witness is None
    if acknowledged or _size(connection) <= _CHECKED_BYTES:
        (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise _refusal(path, str(verdict))
    if acknowledged:
        _accept_losses(connection, path)
    # Empties the log, so that nothing of an unfinished transaction stays behind what will be written.
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return journal_id


def _size(connection: sqlite3.Connection) -> int:
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    return int(pages) * int(page_size)


def _accept_losses(connection: sqlite3.Connection, path: Path) -> None:
    """Take the sums over the rows anew, as they are."""
    log.warning("the journal %r had no tail file: starting with what is left of it, as was asked for", str(path))
    damage = damaged_rows(connection)
    if damage.missing:
        log.error("the journal %r: %s", str(path), damage.missing)
        connection.execute("BEGIN IMMEDIATE")
        totals = Totals.read(connection).counted(connection)
        for check in connection.execute("SELECT chk FROM live UNION ALL SELECT chk FROM models"):
            totals.add_live(check[0])
        totals.write(connection)
        connection.execute("DELETE FROM owners")
        connection.execute("INSERT INTO owners SELECT owner, sum(size) FROM results GROUP BY owner")
        connection.execute("COMMIT")


def _begin_epoch(connection: sqlite3.Connection) -> Totals:
    connection.execute("UPDATE totals SET epoch = epoch + 1, commits = commits + 1")
    return Totals.read(connection)


def _sweep(connection: sqlite3.Connection, files: SideFiles) -> None:
    """Remove the files that no row names: their rows were never committed, or are gone."""
    orphans = []
    for file in files.listed():
        sql = "SELECT 1 FROM live WHERE number = ? AND body = ?"
        if file.kind != BODY:
            sql = "SELECT 1 FROM results WHERE number = ? AND stored = ?"
        if connection.execute(sql, (file.number, IN_FILE)).fetchone() is None:
            orphans.append(file)
    files.remove(orphans)
