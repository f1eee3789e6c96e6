"""Batches of appends as transactions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs

from tinker_core.storage.journal.appends import (
    Accept,
    Append,
    Delivered,
    ForgetDamaged,
    ForgetGroup,
    ForgetModel,
    NoteAttempts,
    Prune,
    Resolve,
    Sweep,
)
from tinker_core.storage.journal.checks import RESULT
from tinker_core.storage.journal.disk import out_of_space
from tinker_core.storage.journal.opening import Opened
from tinker_core.storage.journal.side_files import SideFile
from tinker_core.storage.journal.transaction import Transaction, pending_among

_CHECKPOINT_PAGES = 4096
"""Pages of the write-ahead log, roughly, after which they are moved into the database."""
_FEWEST_PAGES = 64
_MUCH_UNUSED = 65536
_RESERVE_SHARE = 4
"""The log takes at most about this part of the reserve: given away, it has to hold what moves into the database."""
_PAGE_BYTES = 4096
_PAGES_OF_COMMIT = 8
_PAGES_OF_APPEND = 2

Refuse = Callable[[int], str | None]
"""Why a request cannot be taken with which bodies and results would have so many bytes; None if it can."""
Answers = list[tuple[Append, Any]]


@attrs.frozen(kw_only=True)
class Limits:
    """How much the journal may hold."""

    max_bytes: int
    max_result_bytes: int | None
    inline_bytes: int
    """Larger payloads go into files."""


class Committer:
    """Writes batches; belongs to the writer's thread, except that anybody may look at the figures.

    Each method leaves nothing half done: what it raises, `OutOfSpaceError` for a full disk, it has rolled back.
    """

    def __init__(self, opened: Opened, limits: Limits, file_threads: ThreadPoolExecutor) -> None:
        self._opened = opened
        self._limits = limits
        self._file_threads = file_threads
        self._covered = dict(opened.covered)
        self._owners = dict(opened.owners)
        self._log_pages = 0
        share = opened.reserve.size() // _RESERVE_SHARE // _PAGE_BYTES or _CHECKPOINT_PAGES
        self._most_pages = min(_CHECKPOINT_PAGES, max(_FEWEST_PAGES, share))
        self.totals = opened.totals
        self.unswept = set(self._covered)
        """Models whose covered requests may not all have been dropped."""
        self.commits = 0
        """Transactions since the journal was opened."""
        self.appends = 0
        """Appends in them."""
        self.largest_batch = 0

    def commit(self, batch: Sequence[Append], refuse: Refuse) -> Answers:
        """Make a batch durable in one transaction; returns what each append's future gets, errors as values."""
        connection = self._opened.connection
        with out_of_space(self._opened.files.directory):
            written = self._write_files(batch)
            try:
                connection.execute("BEGIN IMMEDIATE")
                transaction = Transaction(connection, self.totals, self._covered)
                answers = self._apply(transaction, batch, frozenset(file.number for file in written), refuse)
                if transaction.changes:
                    transaction.finish()
                connection.execute("COMMIT" if transaction.changes else "ROLLBACK")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                self._opened.files.remove(written)
                raise
        if transaction.changes:
            self._opened.tail.write(transaction.totals.commits)
            self._count(transaction, batch)
        self._opened.files.remove(transaction.unneeded)
        self.unswept |= transaction.unswept
        return answers

    def _count(self, transaction: Transaction, batch: Sequence[Append]) -> None:
        self.totals = transaction.totals
        self.commits += 1
        self.appends += len(batch)
        self.largest_batch = max(self.largest_batch, len(batch))
        for model_id, covered in transaction.covered.items():
            if covered is None:
                self._covered.pop(model_id, None)
            else:
                self._covered[model_id] = covered
        for owner, delta in transaction.owners.items():
            self._owners[owner] = self._owners.get(owner, 0) + delta
            if not self._owners[owner]:
                del self._owners[owner]
        inline = sum(append.size for append in batch)
        self._log_pages += _PAGES_OF_COMMIT + _PAGES_OF_APPEND * len(batch) + inline // _PAGE_BYTES

    def checkpoint(self, *, now: bool = False) -> None:
        """Move the write-ahead log into the database when it has become long, or at once."""
        if self._log_pages < self._most_pages and not now:
            return
        with out_of_space(self._opened.files.directory):
            self._opened.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        self._log_pages = 0

    def shrink(self, num_pages: int) -> None:
        """Give up to so many of the database's unused pages back to the disk."""
        connection = self._opened.connection
        with out_of_space(self._opened.files.directory):
            (unused,) = connection.execute("PRAGMA freelist_count").fetchone()
            if unused:
                # Each step of this statement frees one page; `execute` would take only the first.
                connection.executescript(f"PRAGMA incremental_vacuum({num_pages})")
                self.checkpoint(now=True)

    def has_much_unused(self) -> bool:
        """Whether most of a large database is unused pages, and more than a model's next interval will need."""
        connection = self._opened.connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (unused,) = connection.execute("PRAGMA freelist_count").fetchone()
        return bool(unused > max(_MUCH_UNUSED, pages // 2))

    def _write_files(self, batch: Iterable[Append]) -> list[SideFile]:
        """Write the large results of a batch, and make the names of all files in it durable."""
        files = self._opened.files
        rows = [row for append in batch if isinstance(append, Resolve) for row in append.rows]
        first = {row.number: row.payload for row in reversed(rows)}
        large = {number: payload for number, payload in first.items() if len(payload) > self._limits.inline_bytes}
        named = [SideFile(RESULT, number) for number in pending_among(self._opened.connection, large)]
        writes = [self._file_threads.submit(files.write, file, large[file.number]) for file in named]
        errors = [error for write in writes if (error := write.exception()) is not None]
        if errors:
            files.remove(named)
            raise errors[0]
        if named or any(isinstance(append, Accept) and append.in_file for append in batch):
            files.sync_directory()
        return named

    def _apply(
        self, transaction: Transaction, batch: Sequence[Append], in_files: frozenset[int], refuse: Refuse
    ) -> Answers:
        """Accepts come first: nobody can have built on them yet. The others keep their order."""
        accepts = [append for append in batch if isinstance(append, Accept)]
        answers: Answers = []
        if accepts:
            answers += zip(accepts, transaction.accept(accepts, refuse), strict=True)
        others = [append for append in batch if not isinstance(append, Accept)]
        for kind, group in itertools.groupby(others, key=type):
            appends = list(group)
            if kind is Resolve:
                self._resolve(transaction, [append for append in appends if isinstance(append, Resolve)], in_files)
                answers += [(append, None) for append in appends]
            else:
                answers += [(append, _apply_other(transaction, append)) for append in appends]
        return answers

    def _resolve(self, transaction: Transaction, appends: Sequence[Resolve], in_files: frozenset[int]) -> None:
        rows = [row for append in appends for row in append.rows]
        transaction.resolve(rows, in_files)
        transaction.put_models([row for append in appends for row in append.models])
        self._bound_results(transaction, frozenset(row.number for row in rows))

    def _bound_results(self, transaction: Transaction, spared: frozenset[int]) -> None:
        """Drop the oldest results of whoever keeps most, but none that is just being written."""
        limit = self._limits.max_result_bytes
        exhausted: set[str] = set()
        while limit is not None and (excess := transaction.totals.result_bytes - limit) > 0:
            owners = dict(self._owners)
            for owner, delta in transaction.owners.items():
                owners[owner] = owners.get(owner, 0) + delta
            candidates = owners.keys() - exhausted
            if not candidates:
                return
            owner = max(candidates, key=owners.__getitem__)
            second = max((owners[other] for other in candidates if other != owner), default=0)
            if not transaction.prune_owner(owner, min(excess, max(1, owners[owner] - second)), spared):
                exhausted.add(owner)


def _apply_other(transaction: Transaction, append: Append) -> object:
    match append:
        case ForgetModel():
            transaction.forget_model(append.model_id)
        case ForgetGroup():
            transaction.forget_group(append.group)
        case ForgetDamaged():
            transaction.forget_damaged()
        case NoteAttempts():
            transaction.note_attempts(append.numbers)
        case Sweep():
            transaction.sweep(append.model_ids)
        case Delivered():
            transaction.deliver(append.times)
        case Prune():
            return transaction.prune(append.now)
        case _:
            raise TypeError(f"the journal has no append {type(append).__name__}")
    return None
