"""The process that ``tinker-server`` starts as: it keeps the port, and a server process running behind it.

It knows no settings. The server process reads them, opens the listening socket and hands it over; the next one gets it
back, so that connections wait in its queue meanwhile. Whatever kills the server process leaves its workers without a
parent: they become children of this process, which ends them before it starts the next server.

Only the standard library is loaded here, and little of it: what can fail belongs into the server process.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from tinker_server.orphans import adopt_orphans, children, end_children
from tinker_server.restarts import Life, RestartPolicy

SPARE_SECONDS = 30.0
"""How long after its grace period a server process may take to stop before it is killed."""
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STARTING_GRACE = 60.0
"""How long a process may take to stop that has not said yet what its grace period is."""


def supervise(arguments: Sequence[str]) -> int:
    """Keep a server running with these arguments until a signal; the exit status.

    0 after a signal to stop; the server process's own status when it cannot start; 1 when it keeps failing.
    """
    with _wakeups() as wakeup:
        supervisor = Supervisor(arguments, wakeup)
        try:
            adopt_orphans()
        except OSError as error:
            supervisor.say(f"cannot adopt the workers of a dead server: {error}; they have to end by themselves")
        return supervisor.run()


@contextlib.contextmanager
def _wakeups() -> Iterator[socket.socket]:
    """A socket that gets a byte for every signal, with the signal's number."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    # A hang-up ignored from the start (nohup) stays ignored.
    handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()


def _has_terminal() -> bool:
    """Whether a hang-up may mean that a terminal was closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


class Child:
    """A server process and what it has said of itself."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.process = process
        self.control = control
        self.accepted = False
        self.was_ready = False
        self.replaced = False
        """Whether it was told to make way for another."""
        self.unread = b""


class Supervisor:
    """Starts the server process, listens to it and to signals, and starts the next when it ends."""

    def __init__(self, arguments: Sequence[str], wakeup: socket.socket) -> None:
        self._arguments = list(arguments)
        self._wakeup = wakeup
        self._policy = RestartPolicy()
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._listener: socket.socket | None = None
        self._grace = _STARTING_GRACE
        self._json_log = False
        self._child: Child | None = None
        self._num_starts = 0
        self._ended_at = time.monotonic()
        self._deadline: float | None = None
        """When to start the next process if there is none, or to kill the one that was told to stop."""
        self._foreign = frozenset(children())
        """Children of whatever became this process with ``exec``: they are none of its business."""
        self._stopping = False
        self._status: int | None = None

    def run(self) -> int:
        """Until there is an exit status."""
        try:
            self._start()
            while self._status is None:
                timeout = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
                for key, _ in self._selector.select(timeout):
                    if key.fileobj is self._wakeup:
                        self._take_signals()
                    elif self._child is not None and key.fileobj is self._child.control:
                        self._listen(self._child)
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._deadline_passed()
            return self._status
        finally:
            self._end_everything()

    # --- the server process -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        inherited = [theirs.fileno()]
        if self._listener is not None:
            inherited.append(self._listener.fileno())
        command = [sys.executable, "-P", "-m", "tinker_server.supervised"]
        command += [str(theirs.fileno()), str(inherited[1] if len(inherited) > 1 else -1)]
        command += [str(self._num_starts), repr(self._ended_at), *self._arguments]
        self._num_starts += 1
        self._deadline = None
        with theirs:
            try:
                process = subprocess.Popen(
                    command, pass_fds=inherited, start_new_session=True, stdin=subprocess.DEVNULL
                )
            except OSError as error:
                ours.close()
                self.say(f"the server process cannot be started: {error}")
                self._plan_next(Life(status=-signal.SIGKILL, accepted=False, was_ready=False))
                return
        ours.setblocking(False)
        self._child = Child(process, ours)
        self._selector.register(ours, selectors.EVENT_READ)

    def _listen(self, child: Child) -> None:
        """Read what the server process says, a line at a time; its first line brings the listening socket."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(child.control, 4096, 1)
            except (BlockingIOError, ConnectionResetError):
                return
            for descriptor in descriptors:
                self._keep_listener(socket.socket(fileno=descriptor))
            if not data:
                self._selector.unregister(child.control)
                return
            *lines, child.unread = (child.unread + data).split(b"\n")
            for line in lines:
                self._heard(child, line.decode().split())

    def _keep_listener(self, listener: socket.socket) -> None:
        if self._listener is not None:
            self._listener.close()
        self._listener = listener

    def _heard(self, child: Child, words: list[str]) -> None:
        if words[0] == "listening":
            self._grace = float(words[1]) + SPARE_SECONDS
            self._json_log = words[2] == "json"
        elif words[0] == "accepting":
            child.accepted = True
        elif words[0] == "ready":
            child.was_ready = True

    def _ended(self, child: Child, status: int) -> None:
        self._ended_at = time.monotonic()
        if child.control in self._selector.get_map():
            self._listen(child)  # what it said last
        if child.control in self._selector.get_map():
            self._selector.unregister(child.control)
        child.control.close()
        child.process.returncode = status
        self._child = None
        self._deadline = None
        end_children(keep=self._foreign)
        life = Life(status=status, accepted=child.accepted, was_ready=child.was_ready)
        if self._stopping:
            self._status = max(0, status)
        elif child.replaced:
            self._start()
        else:
            self._plan_next(life)

    def _plan_next(self, life: Life) -> None:
        delay = self._policy.delay(life)
        if delay is None:
            self._status = life.status if life.status >= 0 else 1
            if life.status < 0 or self._num_starts > 1:
                self.say(f"the server process {life.describe()}; giving up after {self._num_starts} starts")
            return
        when = "now" if delay == 0 else f"in {delay:g} s"
        self.say(f"the server process {life.describe()}; starting another {when}")
        self._deadline = self._ended_at + delay

    def _deadline_passed(self) -> None:
        self._deadline = None
        if self._child is None:
            self._start()
        else:
            self.say("the server process does not stop in time; killing it")
            self._child.process.kill()

    # --- signals ------------------------------------------------------------------------------------------------------

    def _take_signals(self) -> None:
        for number in self._wakeup.recv(4096):
            if number == signal.SIGHUP and not _has_terminal():
                self._replace()
            elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self._stop()
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._child is not None and pid == self._child.process.pid:
                self._ended(self._child, os.waitstatus_to_exitcode(status))
            else:
                own = () if self._child is None else (self._child.process.pid,)
                end_children(keep={*self._foreign, *own})

    def _stop(self) -> None:
        if self._listener is not None:
            self._listener.close()  # from now on clients are refused, and come back to the next server
            self._listener = None
        if self._child is None:
            self._status = 0
        elif self._stopping:
            self._child.process.kill()
        else:
            self._stopping = True
            self._child.process.terminate()
            self._deadline = time.monotonic() + self._grace

    def _replace(self) -> None:
        """Have the server process finish its work, and start another, which reads its settings again."""
        if self._child is None or self._stopping or self._child.replaced:
            return
        self._child.replaced = True
        self._child.process.terminate()
        self._deadline = time.monotonic() + self._grace

    def _end_everything(self) -> None:
        if self._child is not None:
            self._child.process.kill()
            self._child.process.wait()
            self._child.control.close()
        end_children(keep=self._foreign, wait=True)
        self._selector.close()
        if self._listener is not None:
            self._listener.close()

    def say(self, message: str) -> None:
        """Write a line to the log."""
        if self._json_log:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            line = json.dumps(
                {"time": now, "level": "WARNING", "logger": "tinker_server.supervisor", "message": message}
            )
        else:
            line = f"tinker-server: {message}"
        with contextlib.suppress(OSError):  # nobody reads the log any more; the server must run on
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
