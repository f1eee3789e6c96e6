"""Usage as the SDK's billing types: hourly buckets, and what is stored now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta

import attrs

from tinker_core.types import CheckpointRecord, JsonObject, SessionRecord, UsageKind, UsageRecord, session_of_run
from tinker_server.prices import GIGABYTE, MILLION, MONTH_HOURS, Prices
from tinker_server.tokens import email_of, urn_of
from tinker_server.wire.records import metadata_to_json

HOUR = timedelta(hours=1)


@attrs.frozen(kw_only=True)
class _Bucket:
    """What one row of the answer is about; amounts with the same one are added up."""

    starts_at: datetime
    kind: UsageKind
    base_model: str
    session_id: str | None
    project_id: str | None


def usage_events_to_json(
    records: Iterable[UsageRecord],
    sessions: Mapping[str, SessionRecord],
    owner: str,
    starting_on: datetime,
    ending_before: datetime,
    prices: Prices,
) -> JsonObject:
    """SDK ``BillingUsageResponse``. ``sessions`` holds every session that a record names."""
    amounts: dict[_Bucket, float] = defaultdict(float)
    for record in records:
        project_id = _project_of(record.session_id, record.project_id, sessions)
        for starts_at, amount in _by_hour(record, starting_on, ending_before):
            bucket = _Bucket(
                starts_at=starts_at,
                kind=record.kind,
                base_model=record.base_model,
                session_id=record.session_id,
                project_id=project_id,
            )
            amounts[bucket] += amount
    ordered = sorted(amounts.items(), key=lambda item: (item[0].starts_at, -_token_count(*item)))
    named = sorted({bucket.session_id for bucket in amounts if bucket.session_id is not None})
    return {
        "data": [_event(bucket, amount, owner, prices) for bucket, amount in ordered],
        "sessions": {name: {"user_metadata": metadata_to_json(sessions[name].user_metadata)} for name in named},
        "cost_data_through": None,
    }


def _project_of(session_id: str | None, project_id: str | None, sessions: Mapping[str, SessionRecord]) -> str | None:
    """The project that the session belongs to by now; it may have been moved since."""
    return project_id if session_id is None else sessions[session_id].project_id


def _by_hour(record: UsageRecord, after: datetime, before: datetime) -> Iterator[tuple[datetime, float]]:
    """Amounts by the beginnings of the hours of a window: the tokens themselves, or gigabyte hours."""
    if record.kind is not UsageKind.STORAGE:
        yield record.starts_at, record.quantity
        return
    hour = max(record.starts_at.replace(minute=0, second=0, microsecond=0), after)
    while hour < min(record.ends_at, before):
        inside = min(record.ends_at, hour + HOUR) - max(record.starts_at, hour)
        yield hour, record.quantity / GIGABYTE * (inside / HOUR)
        hour += HOUR


def _token_count(bucket: _Bucket, amount: float) -> float:
    return 0 if bucket.kind in (UsageKind.STORAGE, UsageKind.CHECKPOINT) else amount


def _event(bucket: _Bucket, amount: float, owner: str, prices: Prices) -> JsonObject:
    per_million = prices.per_million_tokens(bucket.kind)
    per_month = prices.price_storage if bucket.kind is UsageKind.STORAGE else None
    cost = None
    if per_million is not None:
        cost = per_million * amount / MILLION
    elif per_month is not None:
        cost = per_month * amount / MONTH_HOURS
    return {
        "bucket_start": bucket.starts_at.isoformat(),
        "bucket_end": (bucket.starts_at + HOUR).isoformat(),
        "base_model": bucket.base_model,
        "user_id": urn_of(owner),
        "user_name": owner,
        "session_id": bucket.session_id,
        "project_id": bucket.project_id,
        "estimated_cost_usd": cost,
        "effective_rate_usd_per_million_tokens": per_million,
        "effective_rate_usd_per_gigabyte_month": per_month,
        "event_info": _info(bucket.kind, amount),
    }


def _info(kind: UsageKind, amount: float) -> JsonObject:
    if kind is UsageKind.STORAGE:
        # Without "free", which the releases 0.23.4 to 0.30.4 refuse; it means false to those that know it.
        return {"type": "storage", "gigabyte_hours": amount}
    if kind is UsageKind.CHECKPOINT:
        return {"type": "checkpoint", "count": int(amount)}
    if kind in (UsageKind.PREFILL, UsageKind.CACHED_PREFILL):
        cached = kind is UsageKind.CACHED_PREFILL
        return {"type": "sampling_prefill", "cached": cached, "token_count": int(amount)}
    return {"type": kind.value, "token_count": int(amount)}


def storage_to_json(
    checkpoints: Iterable[CheckpointRecord], sessions: Mapping[str, SessionRecord], owner: str, prices: Prices
) -> JsonObject:
    """SDK ``CurrentCheckpointStorageUsageResponse``: checkpoints that exist, by project."""
    counts: dict[str | None, int] = defaultdict(int)
    sizes: dict[str | None, int] = defaultdict(int)
    for checkpoint in checkpoints:
        project_id = project_of_checkpoint(checkpoint, sessions)
        counts[project_id] += 1
        sizes[project_id] += checkpoint.size_bytes
    rate = prices.price_storage
    return {
        "effective_rate_usd_per_gigabyte_month": rate,
        "data": [
            {
                "project_id": project_id,
                "org_user_urn": urn_of(owner),
                "user_email": email_of(owner) or None,
                "user_name": owner,
                "checkpoint_count": counts[project_id],
                "size_bytes": size,
                "size_gigabytes": size / GIGABYTE,
                "estimated_monthly_cost_usd": None if rate is None else rate * size / GIGABYTE,
            }
            for project_id, size in sorted(sizes.items(), key=lambda item: item[0] or "")
        ],
    }


def project_of_checkpoint(checkpoint: CheckpointRecord, sessions: Mapping[str, SessionRecord]) -> str | None:
    """The project that a checkpoint counts towards."""
    session_id = session_of_run(checkpoint.path.run_id)
    if session_id not in sessions:
        return checkpoint.project_id
    return _project_of(session_id, checkpoint.project_id, sessions)
