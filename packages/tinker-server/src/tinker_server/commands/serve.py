"""Serving: the command without a name."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tinker_core.engine.workers import check_plugins
from tinker_core.logs import LOG_FORMAT_VARIABLE, configure_logging
from tinker_core.plugins import Plugins
from tinker_server.arguments import parse_arguments
from tinker_server.commands.failures import reporting_failures
from tinker_server.devices import choose_device
from tinker_server.plugin_list import plugin_names
from tinker_server.supervision import Supervision


@reporting_failures
def run_serve(arguments: Sequence[str], supervision: Supervision) -> int:
    """Serve until a signal stops it; the exit status."""
    configure_logging("text")
    names = plugin_names(os.environ)
    plugins = Plugins.load(*names)
    config = parse_arguments(arguments, plugins)
    configure_logging(config.log_format)
    os.environ[LOG_FORMAT_VARIABLE] = config.log_format  # for whatever processes a plugin starts
    engine_config = config.engine_config(plugins=names, device=choose_device(config.device, os.environ))
    check_plugins(engine_config, plugins)
    from tinker_server.serving import serve

    return serve(config, engine_config, plugins, supervision)
