"""The server process: ``python -m tinker_server.supervised CONTROL_FD LISTENER_FD RESTARTS SINCE [flags]``."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

from tinker_server.supervision import Supervision, join_supervisor


def main() -> int:
    """Serve under the supervisor that started this process; the exit status."""
    control_fd, listener_fd, restarts, since, *arguments = sys.argv[1:]
    supervision = join_supervisor(int(control_fd), int(listener_fd), int(restarts), float(since))
    return _load()(arguments, supervision)


def _load() -> Callable[[list[str], Supervision], int]:
    """What takes long to load, only now: the supervisor may end at any time.

    Nothing of it is garbage, so looking for garbage would only delay the server's return, by a tenth.
    """
    gc.disable()
    import tinker_server.serving  # noqa: F401 - loaded here, used by the command
    from tinker_server.commands.serve import run_serve

    gc.freeze()
    gc.enable()
    return run_serve


if __name__ == "__main__":
    sys.exit(main())
