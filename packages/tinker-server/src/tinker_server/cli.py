"""``tinker-server``: the command. Loads only what the chosen part needs, for the supervisor stays in memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = ("database", "doctor", "keys", "plugins", "tokens", "usage")
"""What the first argument may be besides the commands of plugins; flags are settings of the server."""
FOREGROUND = "--no-supervisor"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status, 2 for settings that cannot work."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-"):
        from tinker_server.commands.run import run_command

        return run_command(given[0], given[1:])
    if FOREGROUND in given:
        from tinker_server.commands.serve import run_serve
        from tinker_server.supervision import Supervision

        return run_serve(given, Supervision())
    from tinker_server.supervisor import supervise

    return supervise(given)


if __name__ == "__main__":
    sys.exit(main())
