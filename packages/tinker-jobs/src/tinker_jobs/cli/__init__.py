"""The command `tinker-server jobs`."""

from __future__ import annotations
