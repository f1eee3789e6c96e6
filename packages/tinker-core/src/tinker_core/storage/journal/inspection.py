"""Looking at a journal that another process may be using: opened for reading only, and never changed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import attrs

from tinker_core.errors import JournalError
from tinker_core.storage.journal.recovery import recover
from tinker_core.storage.journal.schema import DATABASE, FORMAT_VERSION
from tinker_core.storage.journal.totals import Totals


@attrs.frozen(kw_only=True)
class JournalReport:
    """What is in a journal."""

    version: int
    """Its format."""
    pending: int
    """Requests without a result."""
    results: int
    models: int
    num_bytes: int
    """Of bodies and results."""
    damaged: tuple[str, ...]
    """The records whose checksums do not fit."""


def inspect_journal(directory: Path) -> JournalReport | None:
    """Read a journal and check everything in it that is not done with; None if there is none.

    Raises `JournalError` for one that cannot be read, or has a format that this version does not know.
    """
    path = directory / DATABASE
    if not path.exists():
        return None
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            return _report(connection, path)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise JournalError(f"the journal {str(path)!r} cannot be read: {error}") from error


def _report(connection: sqlite3.Connection, path: Path) -> JournalReport:
    (version,) = connection.execute("SELECT version FROM meta").fetchone()
    if version != FORMAT_VERSION:
        raise JournalError(f"the journal {str(path)!r} has format {version}, this version knows {FORMAT_VERSION}")
    totals = Totals.read(connection)
    found = recover(connection, path)
    return JournalReport(
        version=version,
        pending=totals.pending,
        results=totals.results,
        models=len(found.models),
        num_bytes=totals.body_bytes + totals.result_bytes,
        damaged=found.damaged,
    )
