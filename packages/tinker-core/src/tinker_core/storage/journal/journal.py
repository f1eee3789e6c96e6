"""The journal as its owner sees it, on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinker_core.errors import JournalError
from tinker_core.storage.journal.appends import (
    Accept,
    Append,
    ForgetDamaged,
    ForgetGroup,
    ForgetModel,
    NoteAttempts,
    Prune,
    Resolve,
)
from tinker_core.storage.journal.checks import BODY, RESULT, blob_check
from tinker_core.storage.journal.committing import Limits
from tinker_core.storage.journal.disk import OutOfSpaceError, out_of_space
from tinker_core.storage.journal.opening import Opened, open_journal
from tinker_core.storage.journal.reader import Reader
from tinker_core.storage.journal.records import AcceptedRow, JournalStats, ModelRow, Recovered, ResultRow
from tinker_core.storage.journal.side_files import SideFile
from tinker_core.storage.journal.writer import Writer

_EPOCH_BITS = 32
"""Numbers of one process; the next one begins above them all."""

RESERVE_BYTES = 64 * 1024 * 1024
INLINE_BYTES = 64 * 1024


class Journal:
    """Durable requests and results. All methods belong to the event loop that opened it.

    Appends take effect in the order of their calls, except that a large body is written before its request queues.
    After a failure to write, every append raises `JournalError`.
    """

    def __init__(self, opened: Opened, limits: Limits) -> None:
        self._files = opened.files
        self._limits = limits
        self._last = opened.totals.epoch << _EPOCH_BITS
        self._reader = Reader(opened.path, opened.files)
        self._loop = asyncio.get_running_loop()
        self._writer = Writer(opened, limits, self._loop)

    @classmethod
    async def open(
        cls,
        directory: Path,
        *,
        max_bytes: int,
        max_result_bytes: int | None = None,
        reserve_bytes: int = RESERVE_BYTES,
        inline_bytes: int = INLINE_BYTES,
    ) -> Journal:
        """Open or create the journal of a directory, which no other process may use.

        Raises `ConfigurationError` for a journal of a newer format, `JournalError` for one that is damaged.
        """
        opened = await asyncio.to_thread(open_journal, directory, reserve_bytes=reserve_bytes)
        return cls(opened, Limits(max_bytes=max_bytes, max_result_bytes=max_result_bytes, inline_bytes=inline_bytes))

    async def close(self) -> None:
        """Finish what was appended. Appends that a full disk keeps from being written raise `JournalFullError`."""
        await asyncio.to_thread(self._reader.close)
        await asyncio.to_thread(self._writer.close)

    # --- requests -----------------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """A number that no request had before, larger than all earlier ones, also over restarts."""
        self._last += 1
        return self._last

    async def accept(self, row: AcceptedRow) -> bytes | None:
        """Make a request durable; returns None, or the head of the earlier one with its scope and place.

        In the latter case nothing is written. Raises `JournalFullError` beyond the byte bound or while the disk is
        full, `DamagedRecordError` if the earlier one is damaged.
        """
        body = row.body
        check, in_file, refused = 0, False, None
        if body is not None and len(body) > self._limits.inline_bytes:
            refused = self._writer.refusal(len(body))
            if refused is None:
                check, refused = await self._write_body(SideFile(BODY, row.number), body)
            in_file = refused is None
        elif body is not None:
            check = blob_check(BODY, row.number, body)
        earlier: bytes | None = await self._append(Accept(row=row, in_file=in_file, check=check, refused=refused))
        return earlier

    async def _write_body(self, file: SideFile, body: bytes) -> tuple[int, str | None]:
        """Write a large body before its request queues; returns its checksum, or why there is no room."""
        threads = self._writer.file_threads
        writing = self._loop.run_in_executor(threads, self._write_file, file, body)
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            writing.add_done_callback(lambda _: threads.submit(self._files.remove, [file]))
            raise

    def _write_file(self, file: SideFile, body: bytes) -> tuple[int, str | None]:
        try:
            with out_of_space(self._files.directory):
                self._files.write(file, body)
        except OutOfSpaceError as error:
            return 0, self._writer.report_full(str(error))
        except OSError as error:
            self._writer.report_failure(error)
            raise JournalError(
                f"the journal's file {str(self._files.path(file))!r} cannot be written: {error}"
            ) from error
        return blob_check(BODY, file.number, body), None

    def note_attempts(self, numbers: Sequence[int]) -> asyncio.Future[None]:
        """Count for pending requests that a process died while they ran."""
        return self._append(NoteAttempts(numbers=tuple(numbers)))

    # --- results, models, groups --------------------------------------------------------------------------------------

    def resolve(self, rows: Sequence[ResultRow], models: Sequence[ModelRow] = ()) -> asyncio.Future[None]:
        """Store results and models in one transaction; done when durable.

        The first result of a request stays; further ones, and those of unknown requests, are not taken. From
        then on requests of a model with ``seq_id < next_seq_id`` that have a result are covered: `recover` does not
        name them, and their bodies go, the first of them in the same transaction.
        """
        return self._append(Resolve(rows=tuple(rows), models=tuple(models)))

    def put_models(self, models: Sequence[ModelRow]) -> asyncio.Future[None]:
        """Store models without results, as `resolve` does."""
        return self.resolve((), models)

    def forget_model(self, model_id: str) -> asyncio.Future[None]:
        """Drop a model, and the bodies and places of its requests that have results."""
        return self._append(ForgetModel(model_id=model_id))

    def forget_damaged(self) -> asyncio.Future[None]:
        """Drop the records that `recover` named as damaged, after somebody has seen to it that nothing needs them.

        Until then every `recover` names them.
        """
        return self._append(ForgetDamaged())

    def forget_group(self, group: str) -> asyncio.Future[None]:
        """Drop the bodies that were kept for a group."""
        return self._append(ForgetGroup(group=group))

    def delivered(self, number: int, keep_until: float) -> None:
        """Keep a result until ``keep_until``; written with whatever comes next, within about a second."""
        self._writer.deliver(number, keep_until)

    async def prune(self, now: float) -> float | None:
        """Drop the results whose time is over; returns when the next one's is, or None if there are none."""
        following: float | None = now
        more = True
        while more:
            following, more = await self._append(Prune(now=now))
        return following

    def _append(self, append: Append) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        future.add_done_callback(_retrieve)
        append.future = future
        self._writer.submit(append)
        return future

    # --- reading ------------------------------------------------------------------------------------------------------

    async def head(self, number: int) -> bytes | None:
        """The head of a request; None if it is unknown. Raises `DamagedRecordError`."""
        return await self._reader.head(number)

    async def answered(self, scope: str, places: range) -> list[bytes]:
        """Heads of the requests of a scope that have results, oldest first."""
        return await self._reader.answered(scope, places)

    async def body(self, number: int) -> bytes | None:
        """The body of a request; None if it has none, or it is no longer kept. Raises `DamagedRecordError`."""
        return await self._reader.blob(BODY, number)

    async def result(self, number: int) -> bytes | None:
        """A result; None if it is pending, unknown or pruned. Raises `DamagedRecordError`."""
        return await self._reader.blob(RESULT, number)

    async def recover(self) -> Recovered:
        """What an earlier process left, without bodies; to be called once, before anything is appended.

        Raises `JournalError` if the database cannot be read or has lost records as a whole.
        """
        return await self._reader.recover()

    # --- watching -----------------------------------------------------------------------------------------------------

    def stats(self) -> JournalStats:
        """Figures from memory."""
        return self._writer.stats()

    async def wait_failed(self) -> JournalError:
        """Return when the journal can no longer be used, with the reason."""
        return await asyncio.shield(self._writer.failed)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Nobody need wait for an append: a failure is also reported by `Journal.wait_failed`."""
    if not future.cancelled():
        future.exception()
