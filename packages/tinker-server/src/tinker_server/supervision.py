"""The server process's side of its supervisor: what it inherits, what it reports, and the end they share."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading

from tinker_server.orphans import die_with_parent


class Supervision:
    """The connection to the supervisor. Without one, in the foreground, it reports to nobody."""

    def __init__(
        self, control: socket.socket | None = None, listener: socket.socket | None = None, restarts: int = 0,
        since: float | None = None,
    ) -> None:  # fmt: skip
        self.listener = listener
        """The listening socket of the server process before this one."""
        self.restarts = restarts
        """Server processes that ended before this one."""
        self.since = since
        """When the one before ended, or the supervisor began, in seconds of ``time.monotonic``."""
        self._control = control

    @property
    def is_supervised(self) -> bool:
        """Whether there is a supervisor."""
        return self._control is not None

    def listening(self, listener: socket.socket, grace_seconds: float, log_format: str) -> None:
        """Hand over the socket, and what the supervisor has to know of the settings."""
        if self._control is not None:
            line = f"listening {grace_seconds} {log_format}\n".encode()
            socket.send_fds(self._control, [line], [listener.fileno()])

    def accepting(self) -> None:
        """Say that requests are accepted from now on."""
        self._say("accepting")

    def ready(self) -> None:
        """Say that all models are ready."""
        self._say("ready")

    def _say(self, word: str) -> None:
        if self._control is not None:
            self._control.sendall(f"{word}\n".encode())


def join_supervisor(control_fd: int, listener_fd: int, restarts: int, since: float) -> Supervision:
    """Take over what a supervisor left open for this process, and end with it from now on, however it ends."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are the supervisor's to interpret
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    threading.Thread(target=_end_with, args=(control_fd,), name="supervisor-watch", daemon=True).start()
    with contextlib.suppress(OSError):  # where the system does not offer it, the thread does the same
        die_with_parent()
    listener = None
    if listener_fd >= 0:
        listener = socket.socket(fileno=listener_fd)
        listener.set_inheritable(False)
    return Supervision(control, listener, restarts, since)


def _end_with(control_fd: int) -> None:
    # The supervisor never writes; what can be read is the end. Its death also kills this process where the system
    # offers that, but not if it died before `die_with_parent` was called.
    try:
        while os.read(control_fd, 4096):
            pass
    finally:
        os._exit(1)
