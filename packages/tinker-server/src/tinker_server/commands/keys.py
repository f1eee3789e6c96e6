"""``tinker-server keys``: make, list and revoke API keys."""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import attrs

from tinker_core.engine.audit import audit_record
from tinker_core.engine.keyring import new_key
from tinker_core.errors import ConfigurationError, UnknownKeyError
from tinker_core.storage import ControlStore
from tinker_core.types import ApiKeyRecord, KeyLimits
from tinker_server.commands.parsing import Parser, add_common_flags, checked, control_url_of, duration, render

_LIMITS = {
    "max_models": "models alive at a time",
    "max_rank": "highest LoRA rank",
    "max_tokens_in_flight": "tokens of requests without a result; more are delayed, samples are turned away",
    "max_stored_bytes": "bytes of checkpoints that the key's owner may keep",
}
_COLUMNS = ("key_id", "owner", "name", "ends_in", "created_at", "expires_at", "state", "limits")
_OWNER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]{0,99}")


def make_keys_parser() -> argparse.ArgumentParser:
    """The parser of ``tinker-server keys``."""
    parser = Parser(
        prog="tinker-server keys",
        description="API keys of a data directory. A running server takes changes up within seconds.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="create|list|revoke")
    create = actions.add_parser("create", help="make a key and print it, this once", allow_abbrev=False)
    create.add_argument(
        "--owner",
        required=True,
        type=checked("1 to 100 letters, digits and ._@+-", str, lambda text: bool(_OWNER.fullmatch(text))),
        help="whom everything belongs to that is made with the key; several keys may share an owner",
    )
    create.add_argument("--name", default="", help="what the key is for, to tell it from others")
    whole = checked("a whole number of at least 1", int, lambda value: value >= 1)
    for limit, text in _LIMITS.items():
        create.add_argument("--" + limit.replace("_", "-"), type=whole, metavar="N", help=text)
    rate = checked("a number above 0", float, lambda value: 0 < value < math.inf)
    create.add_argument(
        "--max-requests-per-second",
        type=rate,
        metavar="RATE",
        help="submissions and listings; polls, heartbeats and telemetry never count",
    )
    create.add_argument("--expires-in", type=duration, metavar="TIME", help="life of the key, such as 30d or 12h")
    listing = actions.add_parser("list", help="show all keys, never the keys themselves", allow_abbrev=False)
    revoke = actions.add_parser("revoke", help="make a key useless", allow_abbrev=False)
    revoke.add_argument("key_id", metavar="KEY_ID", help="as 'list' shows it")
    for action in (create, listing, revoke):
        add_common_flags(action)
    return parser


def run_keys(arguments: Sequence[str]) -> int:
    """Run the command; the exit status. Raises `ConfigurationError` for arguments that cannot work."""
    given = vars(make_keys_parser().parse_args(list(arguments)))
    url = control_url_of(given, create=given["action"] == "create")
    text = asyncio.run(_run(url, given))
    sys.stdout.write(text)
    return 0


async def _run(url: str, given: dict[str, Any]) -> str:
    control = await ControlStore.open(url)
    try:
        if given["action"] == "create":
            return await _create(control, given)
        if given["action"] == "revoke":
            return await _revoke(control, given)
        now = datetime.now(UTC)
        return _render([_row(record, now) for record in await control.keys.list()], given["format"])
    finally:
        await control.close()


async def _create(control: ControlStore, given: dict[str, Any]) -> str:
    now = datetime.now(UTC)
    limits = KeyLimits(**{field.name: given[field.name] for field in attrs.fields(KeyLimits)})
    expires_at = None if given["expires_in"] is None else now + given["expires_in"]
    key, record = new_key(given["owner"], given["name"], now, limits=limits, expires_at=expires_at)
    await control.keys.add(record)
    await _audit(control, "key_created", record, now)
    if given["format"] == "json":
        return render([{"key": key, **_row(record, now)}], (), "json")
    table = _render([_row(record, now)], "table")
    return f"{key}\n\nThis is the only time the key is shown.\n\n{table}"


async def _revoke(control: ControlStore, given: dict[str, Any]) -> str:
    now = datetime.now(UTC)
    try:
        record = await control.keys.revoke(given["key_id"], now)
    except UnknownKeyError as error:
        raise ConfigurationError(str(error)) from error
    if record.revoked_at == now:
        await _audit(control, "key_revoked", record, now)
    return _render([_row(record, now)], given["format"])


async def _audit(control: ControlStore, event: str, record: ApiKeyRecord, now: datetime) -> None:
    entry = audit_record(event, now, owner=record.owner, key_id=record.key_id, details={"name": record.name})
    await control.audit.add([entry])


def _render(rows: list[dict[str, Any]], output_format: str) -> str:
    if output_format == "table":
        rows = [{**row, "limits": " ".join(f"{name}={value}" for name, value in row["limits"].items())} for row in rows]
    return render(rows, _COLUMNS, output_format)


def _row(record: ApiKeyRecord, now: datetime) -> dict[str, Any]:
    limits = {name: value for name, value in attrs.asdict(record.limits).items() if value is not None}
    return {
        "key_id": record.key_id,
        "owner": record.owner,
        "name": record.name,
        "ends_in": record.last_four,
        "created_at": record.created_at.isoformat(timespec="seconds"),
        "expires_at": None if record.expires_at is None else record.expires_at.isoformat(timespec="seconds"),
        "state": record.refusal(now) or "active",
        "limits": limits,
    }
