"""``tinker-server``: the command."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence

import orjson

from tinker_core.errors import ConfigurationError, StorageError
from tinker_core.plugins import ALL, Plugins
from tinker_server.arguments import parse_arguments
from tinker_server.commands.keys import run_keys
from tinker_server.commands.tokens import run_tokens
from tinker_server.commands.usage import run_usage
from tinker_server.devices import choose_device
from tinker_server.plugin_list import list_plugins

PLUGINS_VARIABLE = "TINKER_PLUGINS"
"""Names of the plugins to load besides ``core``, separated by commas; unset means all that are installed."""

_CORE = "core"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status, 2 for settings that cannot work."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for chatty in ("uvicorn", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        if given[:1] == ["keys"]:
            return run_keys(given[1:])
        if given[:1] == ["tokens"]:
            return run_tokens(given[1:])
        if given[:1] == ["usage"]:
            return run_usage(given[1:])
        names = plugin_names(os.environ)
        plugins = Plugins.load(*names)
        if given[:1] == ["plugins"]:
            return _print_plugins(plugins, given[1:])
        return _serve(given, plugins, names)
    except (ConfigurationError, StorageError) as error:
        sys.stderr.write(f"tinker-server: {error}\n")
        return 2


def _print_plugins(plugins: Plugins, rest: Sequence[str]) -> int:
    if rest:
        raise ConfigurationError(f"'tinker-server plugins' takes no arguments, got {rest[0]!r}")
    sys.stdout.write(orjson.dumps(list_plugins(plugins), option=orjson.OPT_INDENT_2).decode() + "\n")
    return 0


def _serve(given: Sequence[str], plugins: Plugins, names: tuple[str, ...]) -> int:
    config = parse_arguments(given, plugins)
    engine_config = config.engine_config(plugins=names, device=choose_device(config.device, os.environ))
    from tinker_server.serving import serve

    return serve(config, engine_config, plugins)


def plugin_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """What to load, here and in worker processes."""
    text = environment.get(PLUGINS_VARIABLE)
    if text is None:
        return (ALL,)
    return (_CORE, *(name.strip() for name in text.split(",") if name.strip() and name.strip() != _CORE))


if __name__ == "__main__":
    sys.exit(main())
