"""Processes whose parent has died. On Linux they go to the nearest ancestor that asks for them, which ends them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Collection, Iterator

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Have the system kill this process when the thread ends that started it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if not sys.platform.startswith("linux"):
        return  # there, processes find out by themselves, from the end of a pipe
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def end_children(keep: Collection[int], *, wait: bool = False) -> None:
    """Kill the children of this process other than those to ``keep``.

    With ``wait``, also those that become its children by that, until there are none left.
    """
    while victims := [pid for pid in children() if pid not in keep]:
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not wait:
            return
        for pid in victims:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def children() -> Iterator[int]:
    """The running children of this process; none where /proc shows none."""
    parent = os.getpid()
    try:
        names = os.listdir("/proc")
    except FileNotFoundError:
        return
    for name in names:
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, parent_pid = file.read().rpartition(b")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while this looked
        if int(parent_pid) == parent and state != b"Z":
            yield int(name)
