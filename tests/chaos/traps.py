"""A plugin that has its process die at a change of a file, so that half-made files are made on purpose.

Loaded into servers and ranks by ``TINKER_PLUGINS``. A trap is a file named ``server`` or ``rank`` in the directory
``TINKER_CHAOS_TRAPS``; it says at which change below ``TINKER_CHAOS_DATA``, counted from then on, the process that
comes first takes the file away and sends itself SIGKILL. What SQLite and Rust do to files is not seen.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

PLUGIN = "tests.chaos.traps"
_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Traps:
    """Counts changes while a trap is set."""

    def __init__(self, directory: str, data_dir: str) -> None:
        kind = "rank" if "tinker_core.executors.rank" in sys.orig_argv else "server"
        self._trap = os.path.join(directory, kind)
        self._data_dir = data_dir
        self._armed = ""
        self._left = 0
        self._lock = threading.Lock()
        self._looking = threading.local()

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook; it must not raise."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str) and path.startswith(self._data_dir) and int(flags) & _WRITING:
                self.step()
        elif event in _CHANGES:
            # A descriptor, or a name relative to one, is not known to lie elsewhere.
            path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
            if path.startswith(self._data_dir) or not os.path.isabs(path):
                self.step()

    def step(self) -> None:
        """One change; the last one that the trap allows."""
        if getattr(self._looking, "now", False):
            return
        self._looking.now = True
        try:
            with self._lock:
                self._step()
        finally:
            self._looking.now = False

    def _step(self) -> None:
        try:
            with open(self._trap) as file:
                armed = file.read()
        except FileNotFoundError:
            return
        if armed != self._armed:
            self._armed, self._left = armed, int(armed.partition(" ")[0])
        self._left -= 1
        if self._left > 0:
            return
        try:
            os.unlink(self._trap)
        except FileNotFoundError:
            return  # another process was faster
        os.kill(os.getpid(), signal.SIGKILL)


def _counting(function: Callable[[int], None], step: Callable[[], None]) -> Callable[[int], None]:
    def flush(descriptor: Any) -> None:
        step()
        function(descriptor)
        step()

    return flush


def _install() -> None:
    directory, data_dir = os.environ.get("TINKER_CHAOS_TRAPS"), os.environ.get("TINKER_CHAOS_DATA")
    if directory is None or data_dir is None:
        return
    traps = Traps(directory, data_dir)
    sys.addaudithook(traps.audit)
    os.fsync = _counting(os.fsync, traps.step)  # type: ignore[assignment]
    os.fdatasync = _counting(os.fdatasync, traps.step)  # type: ignore[assignment]


_install()
