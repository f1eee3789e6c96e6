"""Which plugins are loaded, and the loaded ones as JSON."""

from __future__ import annotations

from collections.abc import Mapping

from tinker_core.plugins import ALL, Plugins
from tinker_core.types import JsonObject

PLUGINS_VARIABLE = "TINKER_PLUGINS"
"""Names of the plugins to load besides ``core``, separated by commas; unset means all that are installed."""

_CORE = "core"


def plugin_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """What to load, here and in worker processes."""
    text = environment.get(PLUGINS_VARIABLE)
    if text is None:
        return (ALL,)
    return (_CORE, *(name.strip() for name in text.split(",") if name.strip() and name.strip() != _CORE))


def list_plugins(plugins: Plugins) -> list[JsonObject]:
    """Name, distribution, version and hooks of every plugin, by name."""
    return [
        {"name": info.name, "distribution": info.distribution, "version": info.version, "hooks": list(info.hooks)}
        for info in plugins.installed()
    ]
