"""Reading all that is not done with, checking each record."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import attrs

from tinker_core.errors import JournalError
from tinker_core.storage.journal.checks import head_check, live_check, model_check
from tinker_core.storage.journal.records import Fate, GroupRow, ModelRow, PendingRow, Recovered, ReplayRow
from tinker_core.storage.journal.schema import PENDING
from tinker_core.storage.journal.totals import Totals

_LIVE = (
    "SELECT live.number, model_id, seq_id, grp, state, body, body_size, body_chk, live.chk, attempts, "
    "scope, place, owner, requests.chk, head FROM live LEFT JOIN requests USING (number) ORDER BY live.number"
)
_MODELS = "SELECT rowid, model_id, next_seq_id, chk, state FROM models ORDER BY model_id"


def recover(connection: sqlite3.Connection, path: Path) -> Recovered:
    """Models, pending requests and what a replay needs, heads only.

    Raises `JournalError` if the database cannot be read, or has lost rows as a whole: the others would then be in no
    order that anybody ran them in.
    """
    scan = _Scan(path)
    try:
        connection.execute("BEGIN")
        try:
            totals = Totals.read(connection)
            scan.read(connection)
        finally:
            connection.execute("ROLLBACK")
    except sqlite3.DatabaseError as error:
        raise JournalError(f"the journal {str(path)!r} cannot be read: {error}; restore it from a backup") from error
    if missing := scan.missing(totals):
        raise JournalError(f"the journal {str(path)!r} is damaged: {missing}; restore it from a backup")
    return scan.recovered()


@attrs.frozen(kw_only=True)
class Damage:
    """What does not pass its checksum."""

    numbers: list[int]
    """Requests."""
    model_rows: list[int]
    """Row numbers of models."""
    models: list[str]
    """Their ids, as far as they can be read."""
    intact: list[int]
    """The checksums of all others."""
    missing: str | None
    """What the sums over the rows say that is missing as a whole."""


def damaged_rows(connection: sqlite3.Connection) -> Damage:
    """Examine all that is not done with."""
    scan = _Scan(Path())
    scan.read(connection)
    return scan.damage(Totals.read(connection))


class _Scan:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._models: list[ModelRow] = []
        self._pending: list[PendingRow] = []
        self._replay: list[ReplayRow] = []
        self._groups: list[GroupRow] = []
        self._damaged: list[str] = []
        self._damaged_models: set[str] = set()
        self._covered: dict[str, int] = {}
        self._numbers: list[int] = []
        self._model_rows: list[int] = []
        self._intact: list[int] = []
        self._found = Totals.empty()

    def read(self, connection: sqlite3.Connection) -> None:
        for rowid, model_id, next_seq_id, check, state in connection.execute(_MODELS):
            self._found.add_live(check)
            if model_check(model_id, next_seq_id, state) != check:
                self._damage(f"model {model_id!r}", model_id)
                self._model_rows.append(rowid)
            else:
                self._intact.append(check)
                self._covered[model_id] = next_seq_id
                self._models.append(ModelRow(model_id=model_id, next_seq_id=next_seq_id, state=state))
        for row in connection.execute(_LIVE):
            self._add(*row)

    def _add(
        self,
        number: int,
        model_id: str | None,
        seq_id: int | None,
        group: str | None,
        state: str,
        body: int,
        body_size: int,
        body_chk: int,
        chk: int,
        attempts: int,
        scope: str,
        place: int,
        owner: str,
        head_chk: int | None,
        head: bytes,
    ) -> None:
        self._found.add_live(chk)
        if live_check(number, (model_id, seq_id, group, state, body, body_size, body_chk)) != chk:
            self._damage(f"state of request {number}", model_id)
            self._numbers.append(number)
            return
        if head_chk is None or head_check(number, scope, place, owner, head) != head_chk:
            self._damage(f"request {number}", model_id)
            self._numbers.append(number)
            return
        self._intact.append(chk)
        if state == PENDING:
            row = PendingRow(
                number=number, head=head, model_id=model_id, seq_id=seq_id, attempts=attempts, has_body=body > 0
            )
            self._pending.append(row)
        elif model_id is not None and seq_id is not None:
            if seq_id < self._covered.get(model_id, seq_id):
                return  # its snapshot covers it, and it was only not dropped yet
            self._replay.append(ReplayRow(number=number, head=head, model_id=model_id, seq_id=seq_id, fate=Fate(state)))
        else:
            self._groups.append(GroupRow(number=number, group=str(group), head=head))

    def _damage(self, record: str, model_id: object) -> None:
        self._damaged.append(f"{record} in {str(self._path)!r}")
        if isinstance(model_id, str):
            self._damaged_models.add(model_id)

    def missing(self, totals: Totals) -> str | None:
        if self._found.live != totals.live:
            return f"it has {self._found.live} open records instead of {totals.live}"
        if self._found.live_sum != totals.live_sum and not self._damaged:
            return "its open records are not the ones that were written last"
        return None

    def damage(self, totals: Totals) -> Damage:
        return Damage(
            numbers=self._numbers,
            model_rows=self._model_rows,
            models=sorted(self._damaged_models),
            intact=self._intact,
            missing=self.missing(totals),
        )

    def recovered(self) -> Recovered:
        return Recovered(
            models=tuple(self._models),
            pending=tuple(self._pending),
            replay=tuple(sorted(self._replay, key=lambda row: (row.model_id, row.seq_id, row.number))),
            groups=tuple(self._groups),
            damaged=tuple(self._damaged),
            damaged_models=frozenset(self._damaged_models),
        )
