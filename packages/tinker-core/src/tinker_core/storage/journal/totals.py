"""The journal's running sums, kept with the rows they count."""

from __future__ import annotations

import sqlite3

import attrs

_MODULUS = 2**61 - 1

_COUNT = """
SELECT (SELECT coalesce(sum(body_size), 0) FROM live), (SELECT coalesce(sum(size), 0) FROM results),
    (SELECT coalesce(sum(body_size), 0) FROM live WHERE body = 2)
    + (SELECT coalesce(sum(size), 0) FROM results WHERE stored = 2),
    (SELECT count(*) FROM live WHERE state = 'pending'), (SELECT count(*) FROM results)
"""


@attrs.define(kw_only=True)
class Totals:
    """Sums over all rows; written in each transaction, so that rows that vanish are missed."""

    epoch: int
    """How often the journal was opened."""
    commits: int
    live: int
    """Rows of ``live`` and ``models``."""
    live_sum: int
    """Sum of their checksums."""
    body_bytes: int
    result_bytes: int
    file_bytes: int
    """Those of the bytes above that are in side files."""
    pending: int
    results: int

    @classmethod
    def read(cls, connection: sqlite3.Connection) -> Totals:
        """The sums as of the last transaction."""
        names = [field.name for field in attrs.fields(cls)]
        row = connection.execute(f"SELECT {', '.join(names)} FROM totals").fetchone()
        return cls(**dict(zip(names, row, strict=True)))

    @classmethod
    def empty(cls) -> Totals:
        """The sums over nothing."""
        return cls(**{field.name: 0 for field in attrs.fields(cls)})

    def counted(self, connection: sqlite3.Connection) -> Totals:
        """The sums taken anew from the rows, except that over the checksums, which starts at nothing."""
        row = connection.execute(_COUNT).fetchone()
        names = ("body_bytes", "result_bytes", "file_bytes", "pending", "results")
        return attrs.evolve(self, live=0, live_sum=0, **dict(zip(names, row, strict=True)))

    def write(self, connection: sqlite3.Connection) -> None:
        """Put the sums into the current transaction."""
        values = attrs.astuple(self)
        names = ", ".join(f"{field.name} = ?" for field in attrs.fields(type(self)))
        connection.execute(f"UPDATE totals SET {names}", values)

    def add_live(self, check: int) -> None:
        """Count a row of ``live`` or ``models``."""
        self.live += 1
        self.live_sum = (self.live_sum + _number(check)) % _MODULUS

    def drop_live(self, check: int) -> None:
        """Count a row of ``live`` or ``models`` no longer."""
        self.live -= 1
        self.live_sum = (self.live_sum - _number(check)) % _MODULUS


def _number(check: object) -> int:
    """A damaged column may hold anything; the sum then differs, as it should."""
    return check if isinstance(check, int) else 0
