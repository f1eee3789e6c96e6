"""An engine's processes are one process group: whatever is left of a lost engine is ended together."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_TRACKER = b"multiprocessing.resource_tracker"
"""Takes the shared memory of the dead away and then ends by itself; without it the memory would stay taken."""


def end_group(group: int) -> None:
    """Kill all processes of a group but those that tidy up after them. The caller itself comes last if it is one."""
    own = os.getpid()
    members = [pid for pid in _members(group) if pid != own]
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if os.getpgrp() == group:
        os.kill(own, signal.SIGKILL)


def _members(group: int) -> list[int]:
    """Running processes of a group by /proc; none where there is no such thing."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            # The name in parentheses may hold anything; state, parent and group follow its last parenthesis.
            state, _, its_group = (directory / "stat").read_bytes().rpartition(b")")[2].split()[:3]
            if int(its_group) == group and state != b"Z" and _TRACKER not in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while this looked
    return found
