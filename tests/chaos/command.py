"""The real ``tinker-server`` command, started again whenever it ends, as a service manager does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.chaos.tree import Tree, kill, tree_of, wait_gone
from tinker_server.serving import open_socket

ROOT = Path(__file__).parents[2]
READY = re.compile(r"ready (?:again )?on (http\S+)")
"""What the command says with its address, of its first server process or of a later one."""
GONE_SECONDS = 60.0
"""How long the children of a command that died may take to notice."""
START_SECONDS = 120.0
REFUSED = 2
"""Exit status of a command with settings, or files, that no restart would make work."""
MAX_FRUITLESS = 12


def free_port() -> int:
    """A port that nobody listens on now."""
    with open_socket("127.0.0.1", 0) as listener:
        port: int = listener.getsockname()[1]
    return port


def python_path() -> str:
    """The checkout first, so that other processes can import `tests`."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


class Command:
    """A context manager; inside it the command runs, or is about to run again.

    ``log`` gets the standard error of all of its lives. Orphans that outlive their command are noted in ``orphans``.
    ``prefix`` is a command that runs the command; ``between_lives`` is called when nothing of it runs. After
    ``max_fruitless`` lives in a row that never became ready it is not started again.
    """

    def __init__(
        self,
        *flags: str,
        data_dir: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        between_lives: Callable[[], None] = lambda: None,
        max_fruitless: int = MAX_FRUITLESS,
    ) -> None:
        self.data_dir = data_dir
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts = 0
        self.orphans: list[int] = []
        self.exit_codes: list[int] = []
        script = str(Path(sys.executable).parent / "tinker-server")
        self._command = [*prefix, script, "--port", str(self.port), "--data-dir", str(data_dir), *flags]
        self._between_lives = between_lives
        self._max_fruitless = max_fruitless
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **(environment or {})}
        self._stopping = False
        self._over = False
        self._process: subprocess.Popen[bytes] | None = None
        self._family: set[int] = set()
        self._lock = threading.Lock()
        self._ready = threading.Condition()
        self._num_ready = 0
        self._fruitless = 0
        reading, self._pipe = os.pipe()
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Self:
        self._reader.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._stopping = True
            if self._process is not None:
                self._process.terminate()
        self._thread.join(timeout=90)
        kill(self._family)
        if self._thread.is_alive():
            raise RuntimeError(f"the command did not stop within 90 s:\n{self.tail()}")
        self._reader.join()

    def wait_ready(self) -> None:
        """Return once the ready line was printed after the last start so far; raises `RuntimeError` if it never is."""
        with self._ready:
            if not self._ready.wait_for(lambda: self._num_ready > 0 or not self._thread.is_alive(), START_SECONDS):
                raise RuntimeError(f"not ready after {START_SECONDS:.0f} s:\n{self.tail()}")
        if not self._num_ready:
            raise RuntimeError(f"the command ended:\n{self.tail()}")

    def forget_ready(self) -> None:
        """Have `wait_ready` wait for a ready line that comes later."""
        with self._ready:
            self._num_ready = 0

    def tree(self) -> Tree | None:
        """Its processes now; None between two lives."""
        with self._lock:
            if self._process is None:
                return None
            found = tree_of(self._process.pid)
            self._family |= {*found.server, *found.rank}
            return found

    def kill(self, kind: str) -> bool:
        """SIGKILL one kind of its processes; whether there was any."""
        found = self.tree()
        pids = () if found is None else found.pids(kind)
        kill(pids)
        return bool(pids)

    def when_over(self, action: Callable[[], None]) -> None:
        """Have something done when the command has ended for good."""

        def wait() -> None:
            self._thread.join()
            action()

        threading.Thread(target=wait, daemon=True).start()

    def tail(self, lines: int = 60) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _live(self) -> None:
        """The lives of the command, one after the other."""
        try:
            while self._begin():
                self._end()
        finally:
            os.close(self._pipe)
            with self._ready:
                self._ready.notify_all()

    def _end(self) -> None:
        """Wait until the command has ended, with everything that it started."""
        assert self._process is not None
        code = self._process.wait()
        with self._lock:
            self._process = None
        self.exit_codes.append(code)
        staying = wait_gone(self._family, GONE_SECONDS)
        kill(staying)
        self.orphans += staying
        self._family.clear()
        self._over = code == REFUSED or self._fruitless >= self._max_fruitless
        if not self._over and not self._stopping:
            self._between_lives()

    def _read(self, pipe: int) -> None:
        """Copy what all lives write; a pipe of their own would stay open as long as an orphan."""
        with self.log.open("a") as log, open(pipe, errors="replace") as lines:
            for line in lines:
                log.write(line)
                log.flush()
                if READY.search(line):
                    self._note_ready()

    def _begin(self) -> bool:
        with self._lock:
            if self._stopping or self._over:
                return False
            self.starts += 1
            self._fruitless += 1
            self._process = subprocess.Popen(self._command, stderr=self._pipe, env=self._environment)
        return True

    def _note_ready(self) -> None:
        with self._ready:
            self._num_ready += 1
            self._fruitless = 0
            self._ready.notify_all()
