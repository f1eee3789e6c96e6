"""The one version of every package in this repository."""

from __future__ import annotations

__version__ = "0.1.0"
