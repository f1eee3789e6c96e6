"""``python -m tinker_jobs.grpo.guard GROUP DIRECTORY``: cleans up when whoever holds its standard input is gone.

It kills the process group, for Ray leaves agents behind for a minute, and removes the directory. A line on standard
input means that all is well, and nothing is to be done.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def guard_children(directory: Path) -> Iterator[None]:
    """For the length of a block, have all children of this process die with it, and theirs, and a directory too.

    This process becomes the leader of a process group if it is none yet, for that is what dies.
    """
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    process = subprocess.Popen(
        [sys.executable, "-m", "tinker_jobs.grpo.guard", str(os.getpgrp()), str(directory)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield
    finally:
        process.communicate(b"done\n")


def main() -> None:
    """Wait for the end of standard input."""
    if sys.stdin.buffer.readline():
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
    shutil.rmtree(sys.argv[2])


if __name__ == "__main__":
    main()
