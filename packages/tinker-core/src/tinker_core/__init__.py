"""The middle of tinker-server: types, scheduling, plugin hooks, engine, and the training maths shared by trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinker_core.__about__ import __version__

if TYPE_CHECKING:
    from tinker_core.hookspecs import hookimpl
    from tinker_core.plugins import Plugins

__all__ = ["Plugins", "__version__", "hookimpl"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - of whatever is asked for
    # On demand: the process that restarts the server needs the version and must stay small.
    if name == "hookimpl":
        from tinker_core.hookspecs import hookimpl

        return hookimpl
    if name == "Plugins":
        from tinker_core.plugins import Plugins

        return Plugins
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
