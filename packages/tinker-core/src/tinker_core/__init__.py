"""The middle of tinker-server: types, scheduling, plugin hooks, engine, and the training maths shared by trainers."""

from __future__ import annotations

from tinker_core.__about__ import __version__
from tinker_core.hookspecs import hookimpl
from tinker_core.plugins import Plugins

__all__ = ["Plugins", "__version__", "hookimpl"]
