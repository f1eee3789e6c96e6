"""The HTTP server of the Tinker API: a thin Starlette app around the engine of tinker-core."""

from __future__ import annotations

from tinker_core.__about__ import __version__

__all__ = ["__version__"]
