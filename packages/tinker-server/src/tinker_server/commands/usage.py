"""``tinker-server usage``: who used how much, for the operator of a shared server."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from tinker_core.engine.usage import storage_of
from tinker_core.storage import ControlStore
from tinker_core.types import UsageKind, UsageRecord
from tinker_server.commands.parsing import Parser, add_common_flags, control_url_of, duration, render
from tinker_server.prices import GIGABYTE

_COLUMNS = ("owner", "key_id", "project_id", "run_id", "base_model", "kind", "amount", "unit")


def make_usage_parser() -> argparse.ArgumentParser:
    """The parser of ``tinker-server usage``."""
    parser = Parser(
        prog="tinker-server usage",
        description="Usage by owner, key, project and run. What a running server counted last appears after 2 seconds.",
        allow_abbrev=False,
    )
    parser.add_argument("--owner", help="only this owner's")
    parser.add_argument(
        "--last",
        type=duration,
        default=timedelta(days=30),
        metavar="TIME",
        help="how far to look back, such as 30d or 12h; tokens count by whole hours (default: 30d)",
    )
    add_common_flags(parser)
    return parser


def run_usage(arguments: Sequence[str]) -> int:
    """Run the command; the exit status. Raises `ConfigurationError` for arguments that cannot work."""
    given = vars(make_usage_parser().parse_args(list(arguments)))
    url = control_url_of(given)
    now = datetime.now(UTC)
    after = now - min(given["last"], now - datetime(1970, 1, 1, tzinfo=UTC))
    records = asyncio.run(_read(url, given["owner"], after, now))
    sys.stdout.write(render(_rows(records, after, now), _COLUMNS, given["format"]))
    return 0


async def _read(url: str, owner: str | None, after: datetime, now: datetime) -> list[UsageRecord]:
    control = await ControlStore.open(url)
    try:
        used = await control.usage.list(after, now, owner)
        stored = [storage_of(record, now) for record in await control.list_all_checkpoints(owner)]
    finally:
        await control.close()
    return [*used, *(record for record in stored if record.ends_at > after)]


def _rows(records: Sequence[UsageRecord], after: datetime, now: datetime) -> list[dict[str, object]]:
    amounts: defaultdict[tuple[str | None, ...], float] = defaultdict(float)
    for record in records:
        names = (record.owner, record.key_id, record.project_id, record.run_id, record.base_model, record.kind.value)
        amounts[names] += _amount(record, after, now)
    ordered = sorted(amounts.items(), key=lambda item: tuple(name or "" for name in item[0]))
    return [
        {
            **dict(zip(_COLUMNS, names, strict=False)),
            "amount": round(amount, 6) if names[-1] == UsageKind.STORAGE else int(amount),
            "unit": _unit(UsageKind(str(names[-1]))),
        }
        for names, amount in ordered
    ]


def _amount(record: UsageRecord, after: datetime, now: datetime) -> float:
    if record.kind is not UsageKind.STORAGE:
        return record.quantity
    inside = min(record.ends_at, now) - max(record.starts_at, after)
    return record.quantity / GIGABYTE * (inside / timedelta(hours=1))


def _unit(kind: UsageKind) -> str:
    return {UsageKind.STORAGE: "gigabyte hours", UsageKind.CHECKPOINT: "checkpoints"}.get(kind, "tokens")
