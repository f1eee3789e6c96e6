"""The one thread that writes: everything that waits goes into one transaction."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tinker_core.errors import JournalError, JournalFullError
from tinker_core.storage.journal.appends import Accept, Append, Delivered, Resolve, Sweep
from tinker_core.storage.journal.committing import Answers, Committer, Limits
from tinker_core.storage.journal.disk import OutOfSpaceError
from tinker_core.storage.journal.opening import Opened
from tinker_core.storage.journal.records import JournalStats

log = logging.getLogger(__name__)

_BATCH_APPENDS = 512
_BATCH_WHILE_FULL = 32
"""Small transactions find room sooner."""
_BATCH_BYTES = 32 * 1024 * 1024
_FILE_THREADS = 4
_PAGES_AT_ONCE = 512
_PAGES_WHILE_FULL = 64
"""Moving pages needs room itself."""
_RETRY_SECONDS = 1.0
"""While the disk is full, and for appends that nobody waits for."""


class Writer:
    """The queue and its thread. The public methods belong to the event loop, `close` to another thread."""

    def __init__(self, opened: Opened, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self._opened = opened
        self._limits = limits
        self._loop = loop
        self.failed: asyncio.Future[JournalError] = loop.create_future()
        """Done when nothing can be written any more."""
        self.file_threads = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="journal-file")
        """For writing side files."""
        self._committer = Committer(opened, limits, self.file_threads)
        self._condition = threading.Condition()
        self._queue: deque[Append] = deque()
        self._batch: list[Append] = []
        """What is being written."""
        self._arrived = False
        """Whether anything was appended since the last attempt to write."""
        self._found_no_room = False
        """Whether that attempt failed for lack of room: what it was for waits in the queue."""
        self._broken: OSError | None = None
        self._failure: JournalError | None = None
        self._closing = False
        self._shrinking = False
        """Whether there may be more unused pages than there shall be."""
        self._full: str | None = None if opened.has_room else "no room beside the reserve"
        self._thread = threading.Thread(target=self._run, name="journal-writer", daemon=True)
        self._thread.start()

    # --- called from the event loop -----------------------------------------------------------------------------------

    def submit(self, append: Append) -> None:
        """Queue an append; its future gets `JournalError` if the journal has failed or is closed."""
        with self._condition:
            if self._failure is None and not self._closing:
                self._queue.append(append)
                self._arrived = True
                self._condition.notify()
                return
        _set_all([(append, self._failure or JournalError("the journal is closed"))])

    def deliver(self, number: int, keep_until: float) -> None:
        """Note a new time of a result, to be written within about a second."""
        with self._condition:
            last = self._queue[-1] if self._queue else None
            if isinstance(last, Delivered):
                last.times[number] = keep_until
            elif self._failure is None and not self._closing:
                self._queue.append(Delivered(times={number: keep_until}))
                self._condition.notify()

    def report_full(self, cause: str) -> str:
        """Note that a body's file found no room; returns what to tell whoever sent it."""
        with self._condition:
            self._note_full(cause)
            self._condition.notify()
        return self._full_disk(cause)

    def report_failure(self, error: OSError) -> None:
        """Note that a body's file could not be written for another reason than a full disk."""
        with self._condition:
            self._broken = error
            self._condition.notify()

    def refusal(self, size: int) -> str | None:
        """Why no further body of ``size`` bytes can be taken now; None if it can."""
        totals = self._committer.totals
        return self._refuse(totals.body_bytes + totals.result_bytes + size)

    def stats(self) -> JournalStats:
        """Figures from memory."""
        with self._condition:
            waiting_since = min(
                (append.since for append in (*self._batch[:1], *itertools.islice(self._queue, 1))), default=None
            )
            waiting = len(self._batch) + len(self._queue)
        committer, totals = self._committer, self._committer.totals
        return JournalStats(
            body_bytes=totals.body_bytes,
            result_bytes=totals.result_bytes,
            max_bytes=self._limits.max_bytes,
            file_bytes=totals.file_bytes,
            pending=totals.pending,
            results=totals.results,
            waiting=waiting,
            waiting_seconds=0.0 if waiting_since is None else time.monotonic() - waiting_since,
            commits=committer.commits,
            appends=committer.appends,
            largest_batch=committer.largest_batch,
            full=self._full,
            reserve_bytes=self._opened.reserve.held,
        )

    def close(self) -> None:
        """Write what waits and end the threads; blocks. Appends that find no room get `JournalFullError`."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()
        self.file_threads.shutdown()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._gather():
                self._write()
                self._tend()
                self._restore_reserve()
            self._opened.tail.sync()
        except BaseException as error:
            self._fail(error)
        finally:
            self._opened.close()

    def _gather(self) -> bool:
        """Wait for something to do and put it into the batch; False if there will be nothing more."""
        with self._condition:
            while not self._is_urgent():
                patience = self._patience()
                if patience is not None and (patience <= 0 or not self._condition.wait(patience)):
                    break
                if patience is None:
                    self._condition.wait()
            if self._broken is not None:
                raise self._broken
            if self._closing and not (self._queue or self._batch):
                return False
            self._arrived = False
            self._shrinking |= any(_drops(append) for append in self._queue)
            self._batch = self._accepts_to_refuse() if self._full is not None else []
            most = len(self._batch) + (_BATCH_APPENDS if self._full is None else _BATCH_WHILE_FULL)
            size = 0
            while self._queue and len(self._batch) < most and size < _BATCH_BYTES:
                self._batch.append(self._queue.popleft())
                size += self._batch[-1].size
            if self._committer.unswept:
                self._batch.append(Sweep(model_ids=sorted(self._committer.unswept)))
                self._committer.unswept = set()
            return True

    def _accepts_to_refuse(self) -> list[Append]:
        """Take the requests out of the queue, wherever they are: on a full disk they shall not wait for results."""
        accepts: list[Append] = [append for append in self._queue if isinstance(append, Accept)]
        self._queue = deque(append for append in self._queue if not isinstance(append, Accept))
        return accepts

    def _is_urgent(self) -> bool:
        """Whether there is more than deliveries, which can wait for what comes next."""
        if self._closing or self._broken is not None:
            return True
        if self._full is not None:
            return self._arrived or (bool(self._queue) and not self._found_no_room)
        if self._committer.unswept:
            return True
        return len(self._queue) > 1 or (len(self._queue) == 1 and not isinstance(self._queue[0], Delivered))

    def _patience(self) -> float | None:
        if self._full is not None:
            return _RETRY_SECONDS
        if self._queue:
            return self._queue[0].since + _RETRY_SECONDS - time.monotonic()
        return None

    def _write(self) -> None:
        if not self._batch:
            return
        try:
            answers = self._attempt()
            self._found_no_room = False
        except OutOfSpaceError as error:
            answers = self._refused(str(error))
        with self._condition:
            self._batch = []
        self._tell(lambda: _set_all(answers))

    def _attempt(self) -> Answers:
        try:
            return self._committer.commit(self._batch, self._refuse)
        except OutOfSpaceError as error:
            self._give_reserve_away(str(error))
            return self._committer.commit(self._batch, self._refuse)

    def _refused(self, cause: str) -> Answers:
        """Errors for what a full disk ends: requests, and at the end of the journal all. The others go on waiting."""
        self._full = cause
        self._found_no_room = True
        error = JournalFullError(self._full_disk(cause))
        if self._closing:
            log.error("closing the journal with %d appends that found no room: %s", len(self._batch), cause)
            return [(append, error) for append in self._batch]
        with self._condition:
            self._queue.extendleft(append for append in reversed(self._batch) if not isinstance(append, Accept))
            self._arrived = self._arrived or len(self._batch) > _BATCH_WHILE_FULL
        return [(append, error) for append in self._batch if isinstance(append, Accept)]

    def _tend(self) -> None:
        """Keep log and database from growing."""
        try:
            self._committer.checkpoint()
            # Only some appends leave many pages unused; asking after every commit would cost more than it finds.
            if self._shrinking and self._full is None:
                self._shrinking = self._committer.has_much_unused()
                if self._shrinking:
                    self._committer.shrink(_PAGES_AT_ONCE)
        except OutOfSpaceError as error:
            self._give_reserve_away(str(error))

    # --- room ---------------------------------------------------------------------------------------------------------

    def _refuse(self, total: int) -> str | None:
        if self._full is not None:
            return self._full_disk(self._full)
        if total > self._limits.max_bytes:
            return (
                f"the journal may take {self._limits.max_bytes} bytes of requests and results, and would take {total}; "
                "try again when running work is done, or raise --journal-bytes"
            )
        return None

    def _full_disk(self, cause: str) -> str:
        return f"the disk of the journal is full ({cause}); free room for {str(self._opened.path.parent)!r}"

    def _note_full(self, cause: str) -> None:
        if self._full is None:
            log.error("the disk of the journal is full, requests are refused until there is room: %s", cause)
        self._full = cause

    def _give_reserve_away(self, cause: str) -> None:
        self._note_full(cause)
        self._opened.reserve.release()
        try:
            self._committer.checkpoint(now=True)
        except OutOfSpaceError as error:
            log.warning("the write-ahead log of the journal stays as it is: %s", error)

    def _restore_reserve(self) -> None:
        if self._full is None:
            return
        try:
            self._committer.shrink(_PAGES_WHILE_FULL)
        except OutOfSpaceError as error:
            log.warning("the database of the journal stays as large as it is: %s", error)
        if not self._found_no_room and self._opened.reserve.build():
            self._full = None
            log.warning("the disk of the journal has room again")

    # --- endings ------------------------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        path = str(self._opened.path)
        log.critical("the journal %r can no longer be written", path, exc_info=error)
        failure = JournalError(f"the journal {path!r} cannot be written: {type(error).__name__}: {error}")
        with self._condition:
            self._failure = failure
            waiting = [*self._batch, *self._queue]
            self._batch = []
            self._queue.clear()
        self._tell(lambda: _set_all([(append, failure) for append in waiting]))
        self._tell(lambda: self.failed.set_result(failure))

    def _tell(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


def _drops(append: Append) -> bool:
    """Whether an append may leave many pages unused."""
    if isinstance(append, Resolve):
        return bool(append.models)
    return not isinstance(append, Accept | Delivered)


def _set_all(answers: Answers) -> None:
    for append, answer in answers:
        if append.future is None or append.future.done():
            continue
        if isinstance(answer, Exception):
            append.future.set_exception(answer)
        else:
            append.future.set_result(answer)
