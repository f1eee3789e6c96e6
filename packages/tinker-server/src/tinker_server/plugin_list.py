"""The loaded plugins as JSON."""

from __future__ import annotations

from tinker_core.plugins import Plugins
from tinker_core.types import JsonObject


def list_plugins(plugins: Plugins) -> list[JsonObject]:
    """Name, distribution, version and hooks of every plugin, by name."""
    return [
        {"name": info.name, "distribution": info.distribution, "version": info.version, "hooks": list(info.hooks)}
        for info in plugins.installed()
    ]
