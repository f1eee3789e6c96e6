"""The processes of one ``tinker-server`` command, found by walking /proc, and what each of them is."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterable

import attrs

from tests.processes import RANK, children_of, ranks_of

KINDS = ("supervisor", "server", "rank", "all")


@attrs.frozen
class Tree:
    """Pids of a command at one moment; the server is what has ranks for children, or stands above them."""

    supervisor: int
    server: tuple[int, ...]
    rank: tuple[int, ...]

    def pids(self, kind: str) -> tuple[int, ...]:
        """Which processes a kind of kill means; those above come first, so that nobody restarts what is dying."""
        if kind == "all":
            return (self.supervisor, *self.server, *self.rank)
        if kind == "supervisor":
            return (self.supervisor,)
        return self.server or (self.supervisor,) if kind == "server" else self.rank


def tree_of(command: int) -> Tree:
    """The tree below a running command."""
    servers, ranks = [], []
    for pid, arguments in children_of(command).items():
        if RANK in arguments:
            ranks.append(pid)  # a command without a supervisor above it
            continue
        servers.append(pid)
        ranks += ranks_of(pid)
    return Tree(command, tuple(servers), tuple(ranks))


def kill(pids: Iterable[int]) -> None:
    """SIGKILL each, if it still lives."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_gone(pids: Iterable[int], timeout: float) -> list[int]:
    """Wait until processes that are no children of ours have ended; those that have not in ``timeout`` seconds."""
    staying = []
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([handle], [], [], timeout)[0]:
                staying.append(pid)
        finally:
            os.close(handle)
    return staying
