"""The commands besides serving, by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import orjson

from tinker_core.errors import ConfigurationError
from tinker_core.logs import configure_logging
from tinker_core.plugins import Plugins
from tinker_server.cli import COMMANDS
from tinker_server.commands.failures import reporting_failures
from tinker_server.plugin_list import list_plugins, plugin_names


@reporting_failures
def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run a command; the exit status."""
    configure_logging("text")
    if name == "keys":
        from tinker_server.commands.keys import run_keys

        return run_keys(arguments)
    if name == "tokens":
        from tinker_server.commands.tokens import run_tokens

        return run_tokens(arguments)
    if name == "usage":
        from tinker_server.commands.usage import run_usage

        return run_usage(arguments)
    if name == "database":
        from tinker_server.commands.database import run_database

        return run_database(arguments)
    if name == "doctor":
        from tinker_server.commands.doctor import run_doctor

        return run_doctor(arguments)
    if name == "plugins":
        return _print_plugins(arguments)
    return _run_plugin_command(name, arguments)


def _run_plugin_command(name: str, arguments: Sequence[str]) -> int:
    commands = Plugins.load(*plugin_names(os.environ)).commands()
    if name not in commands:
        known = ", ".join(sorted({*COMMANDS, *commands}))
        raise ConfigurationError(f"{name!r} is not a command of tinker-server; commands: {known}; flags begin with --")
    return commands[name].run(arguments)


def _print_plugins(arguments: Sequence[str]) -> int:
    if arguments:
        raise ConfigurationError(f"'tinker-server plugins' takes no arguments, got {arguments[0]!r}")
    plugins = Plugins.load(*plugin_names(os.environ))
    sys.stdout.write(orjson.dumps(list_plugins(plugins), option=orjson.OPT_INDENT_2).decode() + "\n")
    return 0
