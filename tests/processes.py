"""Processes of this machine, as /proc shows them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

RANK = "tinker_core.executors.rank"
"""What the command lines of ranks have in common."""


def children_of(parent: int) -> dict[int, list[str]]:
    """Command lines of the running children of a process, by pid."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            # The name in parentheses may hold anything; state and parent follow its last parenthesis.
            state, parent_pid = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
            arguments = (directory / "cmdline").read_bytes().decode().split("\0")[:-1]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while this looked
        if int(parent_pid) == parent and state != "Z":
            found[int(directory.name)] = arguments
    return found


def ranks_of(parent: int) -> dict[int, int]:
    """The running rank processes of a process: the rank of each, by pid."""
    return {pid: int(words[-1]) for pid, words in children_of(parent).items() if RANK in words}


def kill_workers() -> None:
    """End the ranks of this process the hard way."""
    ranks = ranks_of(os.getpid())
    assert ranks
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
