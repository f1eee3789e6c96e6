"""``tinker-server tokens``: make, list and revoke access tokens for saved weights."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tinker_core.engine.access import issue_token, revoke_token
from tinker_core.engine.audit import audit_record
from tinker_core.errors import ConfigurationError, UserError
from tinker_core.storage import ControlStore
from tinker_core.types import AccessTokenRecord
from tinker_server.commands.parsing import Parser, add_common_flags, control_url_of, duration, render

_COLUMNS = ("token_id", "path", "owner", "created_at", "expires_at", "state")


def make_tokens_parser() -> argparse.ArgumentParser:
    """The parser of ``tinker-server tokens``."""
    parser = Parser(
        prog="tinker-server tokens",
        description="Access tokens of a data directory: each lets whoever holds it load and copy some saved weights, "
        "whoever they belong to. A running server takes changes up at once.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="create|list|revoke")
    create = actions.add_parser("create", help="make a token and print it, this once", allow_abbrev=False)
    create.add_argument("path", metavar="PATH", help="tinker://RUN/KIND/NAME, or tinker://RUN for a whole run")
    create.add_argument("--expires-in", type=duration, metavar="TIME", help="life of the token, such as 30d or 12h")
    listing = actions.add_parser("list", help="show all tokens, never the tokens themselves", allow_abbrev=False)
    revoke = actions.add_parser("revoke", help="make a token useless", allow_abbrev=False)
    revoke.add_argument("token_id", metavar="TOKEN_ID", help="as 'list' shows it")
    for action in (create, listing, revoke):
        add_common_flags(action)
    return parser


def run_tokens(arguments: Sequence[str]) -> int:
    """Run the command; the exit status. Raises `ConfigurationError` for arguments that cannot work."""
    given = vars(make_tokens_parser().parse_args(list(arguments)))
    url = control_url_of(given)
    sys.stdout.write(asyncio.run(_run(url, given)))
    return 0


async def _run(url: str, given: dict[str, Any]) -> str:
    now = datetime.now(UTC)
    control = await ControlStore.open(url)
    try:
        if given["action"] == "create":
            return await _create(control, given, now)
        if given["action"] == "revoke":
            record = await revoke_token(control, given["token_id"], now=now)
            if record.revoked_at == now:
                await _audit(control, "checkpoint_access_token_revoked", record, now)
            return render([_row(record, now)], _COLUMNS, given["format"])
        rows = [_row(record, now) for record in await control.access_tokens.list()]
        return render(rows, _COLUMNS, given["format"])
    except UserError as error:
        raise ConfigurationError(str(error)) from error
    finally:
        await control.close()


async def _create(control: ControlStore, given: dict[str, Any], now: datetime) -> str:
    issued = await issue_token(control, given["path"], expires_in=given["expires_in"], now=now)
    await _audit(control, "checkpoint_access_token_created", issued.record, now)
    row = _row(issued.record, now)
    if given["format"] == "json":
        return render([{"token": issued.token, **row}], (), "json")
    return f"{issued.token}\n\nThis is the only time the token is shown.\n\n{render([row], _COLUMNS, 'table')}"


async def _audit(control: ControlStore, event: str, record: AccessTokenRecord, now: datetime) -> None:
    details: dict[str, object] = {"tinker_path": record.path, "token_id": record.token_id}
    entry = audit_record(event, now, owner=record.owner, project_id=record.project_id, details=details)
    await control.audit.add([entry])


def _row(record: AccessTokenRecord, now: datetime) -> dict[str, object]:
    return {
        "token_id": record.token_id,
        "path": record.path,
        "owner": record.owner,
        "created_at": record.created_at.isoformat(timespec="seconds"),
        "expires_at": None if record.expires_at is None else record.expires_at.isoformat(timespec="seconds"),
        "state": _state(record, now),
    }


def _state(record: AccessTokenRecord, now: datetime) -> str:
    if record.revoked_at is not None:
        return "revoked"
    return "expired" if record.expires_at is not None and record.expires_at <= now else "active"
