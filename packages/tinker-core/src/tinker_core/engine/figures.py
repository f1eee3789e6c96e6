"""What an engine tells of its durability, put together from the journal's figures and those of the snapshots."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from tinker_core.storage.journal import JournalStats
from tinker_core.types import DurabilityMetrics


@attrs.frozen(kw_only=True)
class SnapshotLag:
    """What snapshots do not cover yet."""

    seconds: float = 0.0
    """Age of the oldest change to a model that none covers; 0 when all are covered."""
    requests: int = 0
    """Requests that would run again after a crash, of all models."""
    written: int = 0
    """Snapshots written by this process."""
    failed: int = 0
    """Snapshots that could not be written."""


def total_lag(lags: Iterable[SnapshotLag]) -> SnapshotLag:
    """That of several base models together."""
    each = list(lags)
    return SnapshotLag(
        seconds=max((lag.seconds for lag in each), default=0.0),
        requests=sum(lag.requests for lag in each),
        written=sum(lag.written for lag in each),
        failed=sum(lag.failed for lag in each),
    )


def durability_metrics(journal: JournalStats, snapshots: SnapshotLag) -> DurabilityMetrics:
    """The figures of both."""
    return DurabilityMetrics(
        journal_bytes=journal.body_bytes + journal.result_bytes,
        journal_max_bytes=journal.max_bytes,
        journal_requests=journal.pending,
        journal_results=journal.results,
        journal_waiting=journal.waiting,
        journal_waiting_seconds=journal.waiting_seconds,
        journal_commits=journal.commits,
        journal_full=journal.full is not None,
        snapshot_lag_seconds=snapshots.seconds,
        snapshot_lag_requests=snapshots.requests,
        snapshots_written=snapshots.written,
        snapshots_failed=snapshots.failed,
    )
