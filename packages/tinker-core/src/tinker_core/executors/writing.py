"""Writes captured state to disk on a thread of its own, while the rank goes on."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from tinker_core.executors.rank_loop import Answers, Command, write_and_answer

log = logging.getLogger(__name__)


class WriterThread:
    """Implements `tinker_core.executors.rank_loop.Writes`: one write after the other, as commands come."""

    def __init__(self, open_answers: Callable[[], AbstractContextManager[Answers]]) -> None:
        """``open_answers`` is called on the thread: what it opens belongs to that thread alone."""
        self._open_answers = open_answers
        self._queue: queue.SimpleQueue[tuple[Command, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="state-writer", daemon=True)
        self._thread.start()

    def start(self, command: Command, write: Callable[[], None]) -> None:
        """Queue a write."""
        self._queue.put((command, write))

    def finish(self) -> None:
        """Return when everything queued is written and answered; ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._open_answers() as answers:
                while (item := self._queue.get()) is not None:
                    write_and_answer(*item, answers)
                    del item  # it holds a copy of a whole model
        except BaseException:
            # Nobody would be answered any more: the group must be lost instead.
            log.exception("the writer of captured state failed")
            os._exit(1)
