"""The journal: accepted requests, their results and what snapshots cover, durable before anybody is told of them.

It stores bytes and knows nothing of what they mean. One SQLite file in WAL mode with ``synchronous=FULL``, large
payloads in files beside it, one writer thread that commits everything that waits at once.
"""

from __future__ import annotations

from tinker_core.storage.journal.journal import Journal
from tinker_core.storage.journal.records import (
    AcceptedRow,
    Fate,
    GroupRow,
    JournalStats,
    ModelRow,
    PendingRow,
    Recovered,
    ReplayRow,
    ResultRow,
)

__all__ = [
    "AcceptedRow",
    "Fate",
    "GroupRow",
    "Journal",
    "JournalStats",
    "ModelRow",
    "PendingRow",
    "Recovered",
    "ReplayRow",
    "ResultRow",
]
