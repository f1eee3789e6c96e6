"""Schema of the control database, step by step; `tinker_core.storage.database.migrate` runs it at start."""

from __future__ import annotations
