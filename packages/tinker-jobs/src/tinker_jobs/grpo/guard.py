"""``python -m tinker_jobs.grpo.guard GROUP``: kills a process group when whoever holds its standard input is gone.

Of a driver that is killed, Ray leaves agents behind for a minute. A line on standard input means that all is well, and
nothing is to be killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def guard_children() -> Iterator[None]:
    """For the length of a block, have all children of this process die with it, and theirs.

    This process becomes the leader of a process group if it is none yet, for that is what dies.
    """
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    process = subprocess.Popen(
        [sys.executable, "-m", "tinker_jobs.grpo.guard", str(os.getpgrp())],
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
    if not sys.stdin.buffer.readline():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(sys.argv[1]), signal.SIGKILL)


if __name__ == "__main__":
    main()
