"""What survives a restart: control records in a database, checkpoints in a directory."""

from __future__ import annotations

from tinker_core.storage.checkpoints import CheckpointStore
from tinker_core.storage.control import ControlStore
from tinker_core.storage.database import database_url

__all__ = ["CheckpointStore", "ControlStore", "database_url"]
