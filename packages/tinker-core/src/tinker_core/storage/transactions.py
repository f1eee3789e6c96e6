"""One piece of SQL work in one transaction: repeated when the database asks for that, and with errors of our own."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa

from tinker_core.errors import DatabaseUnavailableError, StorageError, TinkerError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_REPEAT = frozenset({"40001", "40P01"})
"""What Postgres says (SQLSTATE) when transactions of several servers got in each other's way and one must yield."""
_ATTEMPTS = 5


def run_transaction(engine: sa.Engine, work: Callable[[sa.Connection], _T], alone: str | None = None) -> _T:
    """Do some work in one transaction. It may be done several times, so it must do nothing but SQL.

    It is done again when the database rolled it back for the sake of another one, from then on after the statement
    ``alone``, which keeps all other writers out, so that it cannot happen for ever. It is done again, once, when the
    connection was lost before the end. A connection that is lost during the commit may have taken it or not: that is
    an error, for only the caller knows whether the work can be done twice.

    Raises `DatabaseUnavailableError` when the database cannot be reached, `StorageError` when it fails otherwise, and
    what `work` raises.
    """
    reconnected, conflicts = False, 0
    while True:
        committing = False
        try:
            with engine.begin() as connection:
                if conflicts and alone is not None:
                    connection.exec_driver_sql(alone)
                result = work(connection)
                committing = True
            return result
        except sa.exc.SQLAlchemyError as error:
            lost = isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
            if _sqlstate(error) in _REPEAT and conflicts + 1 < _ATTEMPTS:
                conflicts += 1
            elif lost and not committing and not reconnected:
                reconnected = True
            else:
                raise storage_error(error) from error


def storage_error(error: sa.exc.SQLAlchemyError) -> TinkerError:
    """The error to raise instead. It carries the database's own words only: statement and values are not for everyone.

    A value that one of our column types refused keeps its own error.
    """
    if isinstance(error, sa.exc.StatementError) and isinstance(error.orig, TinkerError):
        return error.orig
    if isinstance(error, sa.exc.DBAPIError) and is_unavailable(error):
        log.error("the control database cannot be reached: %s", words_of(error))
        return DatabaseUnavailableError()
    return StorageError(f"the control database failed: {words_of(error)}; check its free space and permissions")


def is_unavailable(error: sa.exc.DBAPIError) -> bool:
    """Whether a database server is down, starting, stopping or out of connections, rather than refusing this work."""
    state = _sqlstate(error)
    if state is not None:
        return state[:2] in ("08", "53") or state in ("57P01", "57P02", "57P03")
    # Without a state it is not the server that answered: Postgres was not reached. SQLite has no states at all.
    reached = not isinstance(error, sa.exc.OperationalError) or isinstance(error.orig, sqlite3.Error)
    return error.connection_invalidated or not reached


def _sqlstate(error: sa.exc.SQLAlchemyError) -> str | None:
    return getattr(error.orig, "sqlstate", None) if isinstance(error, sa.exc.DBAPIError) else None


def words_of(error: sa.exc.SQLAlchemyError) -> str:
    """What the database itself said, without statement and values."""
    if not isinstance(error, sa.exc.StatementError):
        return type(error).__name__
    # Postgres tells the values that are in the way in further lines.
    primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    return str(primary or error.orig)
