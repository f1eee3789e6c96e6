"""The endpoints, one module a noun. They decode, call the engine, and encode."""

from __future__ import annotations
