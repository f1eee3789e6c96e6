"""Access tokens: whoever holds one may read the weights that it names, whoever they belong to."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime, timedelta

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.errors import UnknownAccessTokenError, UnknownCheckpointError, UnknownModelError
from tinker_core.storage.access_tokens import AccessTokenStore
from tinker_core.storage.control import ControlStore
from tinker_core.types import AccessTokenRecord, CheckpointRecord, TinkerPath

PREFIX = "tml-access-"
_SCHEME = "tinker://"


def hash_of(token: str) -> str:
    """What is kept of a token. Tokens hold 256 random bits, so that a plain hash cannot be guessed from."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


class AccessTokens:
    """Checks tokens."""

    def __init__(self, store: AccessTokenStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def opens(self, token: str, checkpoint: CheckpointRecord) -> bool:
        """Whether a token lets its holder read a checkpoint now."""
        record = await self._store.find(hash_of(token))
        if record is None or record.revoked_at is not None or record.owner != checkpoint.owner:
            return False
        if record.expires_at is not None and record.expires_at <= self._clock.now():
            return False
        return record.path in (str(checkpoint.path), f"{_SCHEME}{checkpoint.path.run_id}")


@attrs.frozen(kw_only=True)
class IssuedToken:
    """A new token. This is the only time that its text exists outside its holder's hands."""

    token: str = attrs.field(repr=False)
    record: AccessTokenRecord


async def issue_token(control: ControlStore, path: str, *, expires_in: timedelta | None, now: datetime) -> IssuedToken:
    """Make a token for ``tinker://<run>/<kind>/<name>``, or for all checkpoints of ``tinker://<run>``.

    Raises `UnknownCheckpointError` or `UnknownModelError` when there is nothing of that name.
    """
    owner, project_id = await _owner_of(control, path)
    token = PREFIX + secrets.token_urlsafe(32)
    record = AccessTokenRecord(
        token_id=f"at-{secrets.token_hex(6)}",
        token_hash=hash_of(token),
        path=path,
        created_at=now,
        owner=owner,
        project_id=project_id,
        expires_at=None if expires_in is None else now + expires_in,
    )
    await control.access_tokens.add(record)
    return IssuedToken(token=token, record=record)


async def revoke_token(control: ControlStore, token_id: str, *, now: datetime) -> AccessTokenRecord:
    """End a token at once; raises `UnknownAccessTokenError`."""
    record = await control.access_tokens.revoke(token_id, now)
    if record is None:
        raise UnknownAccessTokenError(token_id)
    return record


async def _owner_of(control: ControlStore, path: str) -> tuple[str, str | None]:
    run_id = path.removeprefix(_SCHEME)
    if path.startswith(_SCHEME) and run_id and "/" not in run_id:
        run = await control.get_run(run_id)
        if run is None:
            raise UnknownModelError(run_id)
        return run.owner, run.project_id
    checkpoint = await control.get_checkpoint(TinkerPath.parse(path))
    if checkpoint is None:
        raise UnknownCheckpointError(path)
    return checkpoint.owner, checkpoint.project_id
