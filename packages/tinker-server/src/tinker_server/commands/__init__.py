"""Commands besides serving: they read and write a data directory, also while a server uses it."""

from __future__ import annotations
