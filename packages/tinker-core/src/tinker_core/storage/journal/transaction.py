"""What each kind of append does to the tables, within one transaction."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import attrs

from tinker_core.errors import DamagedRecordError, JournalFullError
from tinker_core.storage.journal.appends import Accept
from tinker_core.storage.journal.checks import BODY, RESULT, blob_check, head_check, model_check
from tinker_core.storage.journal.live import LIVE_COLUMNS, LiveRow, live_row
from tinker_core.storage.journal.records import Fate, ModelRow, ResultRow
from tinker_core.storage.journal.recovery import damaged_rows
from tinker_core.storage.journal.schema import IN_FILE, INLINE, PENDING, Value, change, insert, keys, select
from tinker_core.storage.journal.side_files import SideFile
from tinker_core.storage.journal.totals import Totals

SWEPT_AT_ONCE = 128
"""Requests of a model that one transaction drops because a snapshot covers them: it must stay small next to the reserve
of a full disk, and nothing else is written meanwhile."""
PRUNED_AT_ONCE = 512
"""Results that one transaction drops for their age."""

_LIVE = f"SELECT {LIVE_COLUMNS} FROM live "
_DROP_REQUESTS = (
    "DELETE FROM requests WHERE number IN (?) "
    "AND NOT EXISTS (SELECT 1 FROM {other} WHERE {other}.number = requests.number)"
)
_PENDING = "SELECT number FROM live WHERE state = 'pending'"
_RESULTS = "SELECT number, owner, stored, size FROM results "


def pending_among(connection: sqlite3.Connection, numbers: Iterable[int]) -> list[int]:
    """Those requests that have no result."""
    return [cast("int", row[0]) for row in select(connection, f"{_PENDING} AND number IN (?)", keys(numbers))]


def scope_hash(scope: str) -> int:
    """What the index holds in place of a scope."""
    return int.from_bytes(hashlib.blake2b(scope.encode(), digest_size=8).digest(), "big", signed=True)


class Transaction:
    """Changes to the tables and to the sums over them. The caller begins and ends it."""

    def __init__(self, connection: sqlite3.Connection, totals: Totals, covered: Mapping[str, int]) -> None:
        self._connection = connection
        self.totals = attrs.evolve(totals)
        self.covered: dict[str, int | None] = {}
        """Changes to how far the models' snapshots reach; None: the model is forgotten."""
        self._covered = covered
        self.owners: dict[str, int] = {}
        """Changes to the bytes of results by owner."""
        self.unswept: set[str] = set()
        """Models of which more is covered than was dropped."""
        self.unneeded: list[SideFile] = []
        """Side files to be removed once this transaction is durable."""
        self.changes = 0
        """How many rows changed; without any there is nothing to commit."""

    def finish(self) -> None:
        """Put the sums into the transaction."""
        self.totals.commits += 1
        self.totals.write(self._connection)
        rows = [(owner, delta) for owner, delta in self.owners.items() if delta]
        add = "ON CONFLICT (owner) DO UPDATE SET bytes = bytes + excluded.bytes"
        insert(self._connection, "owners", rows, then=add)
        fewer = [owner for owner, delta in rows if delta < 0]
        change(self._connection, "DELETE FROM owners WHERE bytes = 0 AND owner IN (?)", keys(fewer))

    # --- requests -----------------------------------------------------------------------------------------------------

    def accept(self, appends: Sequence[Accept], refuse: Callable[[int], str | None]) -> list[bytes | Exception | None]:
        """Insert requests that are new; answers for each the head of the earlier one, an error, or None."""
        earlier = self._earlier([append.row for append in appends])
        answers: list[bytes | Exception | None] = []
        new: list[Accept] = []
        taken: dict[tuple[str, int], bytes | Exception] = dict(earlier)
        for append in appends:
            row, size = append.row, len(append.row.body or b"")
            key = (row.scope, row.place)
            if key in taken:
                answers.append(taken[key])
            elif reason := append.refused or refuse(self.totals.body_bytes + self.totals.result_bytes + size):
                answers.append(JournalFullError(reason))
            else:
                answers.append(None)
                taken[key] = row.head
                new.append(append)
                self.totals.body_bytes += size
                continue
            if append.in_file:
                self.unneeded.append(SideFile(BODY, row.number))
        self._insert(new)
        return answers

    def _earlier(self, rows: Sequence[Any]) -> dict[tuple[str, int], bytes | Exception]:
        wanted = {(row.scope, row.place) for row in rows}
        hashes = {scope: scope_hash(scope) for scope, _ in wanted}
        found: dict[tuple[str, int], bytes | Exception] = {}
        sql = (
            "SELECT number, scope, place, owner, chk, head FROM (VALUES (?,?)) AS key "
            "CROSS JOIN requests ON scope_hash = key.column1 AND place = key.column2"
        )
        for row in select(self._connection, sql, [(hashes[scope], place) for scope, place in wanted]):
            number, scope, place, owner, check, head = cast("Any", row)
            if (scope, place) in wanted:
                if head_check(number, scope, place, owner, head) == check:
                    found[scope, place] = head
                else:
                    found[scope, place] = DamagedRecordError(f"request {number} in the journal is damaged")
        return found

    def _insert(self, appends: Sequence[Accept]) -> None:
        requests, lives, bodies = [], [], []
        for append in appends:
            row = append.row
            check = head_check(row.number, row.scope, row.place, row.owner, row.head)
            requests.append((row.number, scope_hash(row.scope), row.place, row.scope, row.owner, check, row.head))
            stored = 0 if row.body is None else IN_FILE if append.in_file else INLINE
            size = len(row.body or b"")
            live = live_row(row.number, row.model_id, row.seq_id, row.group, PENDING, stored, size, append.check)
            lives.append(live.stored())
            self.totals.add_live(live.check)
            if stored == INLINE:
                bodies.append((row.number, row.body))
            elif stored == IN_FILE:
                self.totals.file_bytes += size
        self.changes += len(appends)
        self.totals.pending += len(appends)
        insert(self._connection, "requests", requests)
        insert(self._connection, "live", lives)
        insert(self._connection, "bodies", bodies)

    def note_attempts(self, numbers: Sequence[int]) -> None:
        """Count that a process died while these ran."""
        counted = "UPDATE live SET attempts = attempts + 1 WHERE number IN (?)"
        self.changes += change(self._connection, counted, keys(set(numbers)))

    # --- results ------------------------------------------------------------------------------------------------------

    def resolve(self, rows: Sequence[ResultRow], in_files: frozenset[int]) -> None:
        """Store the first result of each pending request; a later one is not taken."""
        first = {row.number: row for row in reversed(rows)}
        pending = {live.number: live for live in self._intact("WHERE number IN (?)", first) if live.state == PENDING}
        results, payloads, changed, done = [], [], [], []
        for number, row in first.items():
            if number not in pending:
                continue
            size = len(row.payload)
            stored = IN_FILE if number in in_files else INLINE
            check = blob_check(RESULT, number, row.payload)
            results.append((number, row.owner, row.keep_until, stored, size, check))
            if stored == INLINE:
                payloads.append((number, row.payload))
            else:
                self.totals.file_bytes += size
            self.owners[row.owner] = self.owners.get(row.owner, 0) + size
            self.totals.result_bytes += size
            live = pending[number]
            if self._needed(live, row.fate):
                changed.append((live, live.changed(row.fate.value, keep_body=row.fate is Fate.KEEP)))
            else:
                done.append(live)
        self.changes += len(results)
        self.totals.results += len(results)
        self.totals.pending -= len(results)
        insert(self._connection, "results", results)
        insert(self._connection, "payloads", payloads)
        self._rewrite(changed)
        self._release(done)

    def _needed(self, live: LiveRow, fate: Fate) -> bool:
        if live.model_id is None or live.seq_id is None:
            return fate is Fate.KEEP and live.group is not None
        covered = self.covered.get(live.model_id, self._covered.get(live.model_id))
        return fate is not Fate.DROP and (covered is None or live.seq_id >= covered)

    def _rewrite(self, changes: Sequence[tuple[LiveRow, LiveRow]]) -> None:
        for old, new in changes:
            self.totals.drop_live(old.check)
            self.totals.add_live(new.check)
        self._drop_bodies([old for old, new in changes if not new.body])
        insert(self._connection, "live", [new.stored() for _, new in changes], verb="REPLACE")

    def deliver(self, times: Mapping[int, float]) -> None:
        """Change how long results are kept."""
        sql = "UPDATE results SET keep_until = t.column2 FROM (VALUES (?,?)) AS t WHERE number = t.column1"
        self.changes += change(self._connection, sql, times.items())

    def prune(self, now: float) -> tuple[float | None, bool]:
        """Drop some results whose time is over; returns when the next one's is, and whether it is already."""
        overdue = "WHERE keep_until <= ? ORDER BY keep_until LIMIT ?"
        rows = self._connection.execute(_RESULTS + overdue, (now, PRUNED_AT_ONCE)).fetchall()
        self._drop_results(rows)
        (following,) = self._connection.execute("SELECT min(keep_until) FROM results").fetchone()
        return following, following is not None and following <= now

    def prune_owner(self, owner: str, excess: int, spared: frozenset[int]) -> bool:
        """Drop the oldest results of an owner until ``excess`` bytes are gone; False if there is nothing to drop."""
        chosen: list[tuple[int, str, int, int]] = []
        for row in self._connection.execute(_RESULTS + "WHERE owner = ? ORDER BY number", (owner,)):
            if excess <= 0 or len(chosen) >= PRUNED_AT_ONCE:
                break
            if row[0] not in spared:
                chosen.append(row)
                excess -= row[3]
        self._drop_results(chosen)
        return bool(chosen)

    def _drop_results(self, rows: Sequence[tuple[int, str, int, int]]) -> None:
        numbers = [row[0] for row in rows]
        for number, owner, stored, size in rows:
            self.owners[owner] = self.owners.get(owner, 0) - size
            self.totals.result_bytes -= size
            if stored == IN_FILE:
                self.totals.file_bytes -= size
                self.unneeded.append(SideFile(RESULT, number))
        self.changes += len(rows)
        self.totals.results -= len(rows)
        change(self._connection, "DELETE FROM results WHERE number IN (?)", keys(numbers))
        change(self._connection, "DELETE FROM payloads WHERE number IN (?)", keys(numbers))
        change(self._connection, _DROP_REQUESTS.format(other="live"), keys(numbers))

    # --- models and groups --------------------------------------------------------------------------------------------

    def put_models(self, models: Sequence[ModelRow]) -> None:
        """Store models and begin to drop what their snapshots cover."""
        latest = {row.model_id: row for row in models}
        self._forget_rows(latest)
        rows = []
        for row in latest.values():
            check = model_check(row.model_id, row.next_seq_id, row.state)
            self.totals.add_live(check)
            rows.append((row.model_id, row.next_seq_id, check, row.state))
            self.covered[row.model_id] = row.next_seq_id
        self.changes += len(rows)
        insert(self._connection, "models", rows)
        self.sweep(latest)

    def sweep(self, model_ids: Iterable[str]) -> None:
        """Drop some of what the models' snapshots cover, and note the models of which there is more."""
        for model_id in model_ids:
            covered = self.covered.get(model_id, self._covered.get(model_id))
            where = "WHERE model_id = ? AND seq_id < ? AND state <> 'pending' LIMIT ?"
            lives = self._live_where(where, (model_id, covered, SWEPT_AT_ONCE)) if covered is not None else []
            self._release(lives)
            if len(lives) == SWEPT_AT_ONCE:
                self.unswept.add(model_id)

    def forget_model(self, model_id: str) -> None:
        """Drop a model with all its resolved requests' bodies and places."""
        self._forget_rows([model_id])
        self.covered[model_id] = None
        self._release(self._live_where("WHERE model_id = ? AND state <> 'pending'", (model_id,)))

    def forget_group(self, group: str) -> None:
        """Drop the bodies that a group kept."""
        kept = "WHERE grp = ? AND model_id IS NULL AND state <> 'pending'"
        self._release(self._live_where(kept, (group,)))

    def _forget_rows(self, model_ids: Iterable[str]) -> None:
        ids = list(model_ids)
        for (check,) in select(self._connection, "SELECT chk FROM models WHERE model_id IN (?)", keys(ids)):
            self.totals.drop_live(cast("int", check))
        self.changes += change(self._connection, "DELETE FROM models WHERE model_id IN (?)", keys(ids))

    def forget_damaged(self) -> None:
        """Drop the rows whose checksums do not fit, and take the sums anew."""
        damage = damaged_rows(self._connection)
        for model_id in damage.models:
            self.covered[model_id] = None
        self.changes += change(self._connection, "DELETE FROM models WHERE rowid IN (?)", keys(damage.model_rows))
        self._drop_rows(damage.numbers)
        change(self._connection, "DELETE FROM bodies WHERE number IN (?)", keys(damage.numbers))
        self.unneeded += [SideFile(BODY, number) for number in damage.numbers]
        self.totals = self.totals.counted(self._connection)
        for check in damage.intact:
            self.totals.add_live(check)

    def _intact(self, where: str, numbers: Iterable[int]) -> list[LiveRow]:
        lives = [LiveRow(*cast("Any", row)) for row in select(self._connection, _LIVE + where, keys(numbers))]
        for live in lives:
            if not live.is_intact:
                raise DamagedRecordError(f"the state of request {live.number} is damaged: its checksum does not fit")
        return lives

    def _live_where(self, where: str, values: tuple[Value, ...]) -> list[LiveRow]:
        return [LiveRow(*row) for row in self._connection.execute(_LIVE + where, values)]

    def _release(self, lives: Sequence[LiveRow]) -> None:
        for live in lives:
            self.totals.drop_live(live.check)
        self._drop_bodies(lives)
        self._drop_rows([live.number for live in lives])

    def _drop_rows(self, numbers: Sequence[int]) -> None:
        self.changes += change(self._connection, "DELETE FROM live WHERE number IN (?)", keys(numbers))
        change(self._connection, _DROP_REQUESTS.format(other="results"), keys(numbers))

    def _drop_bodies(self, lives: Sequence[LiveRow]) -> None:
        for live in lives:
            self.totals.body_bytes -= live.body_size
            if live.body == IN_FILE:
                self.totals.file_bytes -= live.body_size
                self.unneeded.append(SideFile(BODY, live.number))
        inline = [live.number for live in lives if live.body == INLINE]
        change(self._connection, "DELETE FROM bodies WHERE number IN (?)", keys(inline))
