"""API keys: how they are made, and how a running server knows them without asking the database each time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from datetime import datetime

import attrs

from tinker_core.engine.audit import AuditLog
from tinker_core.engine.clock import Clock
from tinker_core.errors import AuthenticationError, DatabaseUnavailableError, UnknownKeyError
from tinker_core.extensions import IssuedKey
from tinker_core.storage.keys import KeyStore
from tinker_core.types import LOCAL_CALLER, ApiKeyRecord, Caller, KeyLimits

log = logging.getLogger(__name__)

KEY_PREFIX = "tml-"
"""Clients refuse a key that begins otherwise."""

REFRESH_SECONDS = 2.0
"""Age at which what is known of the keys is read again, behind the backs of requests."""
STALE_SECONDS = 5.0
"""Age at which requests wait until it is read again: a revoked key opens nothing for longer than this."""
OUTAGE_SECONDS = 600.0
"""Age up to which what is known of the keys still counts while the database cannot be reached: training goes on, and
nobody could revoke a key there either."""
UNKNOWN_KEY_SECONDS = 0.1
"""Time between two readings for unknown keys, which wait for the next one: a new key is known at once, and wrong keys
cost the database little, however many there are."""


def new_key(
    owner: str,
    name: str,
    now: datetime,
    *,
    limits: KeyLimits = KeyLimits(),  # noqa: B008 - frozen
    expires_at: datetime | None = None,
) -> tuple[str, ApiKeyRecord]:
    """A new key, which is never shown again, and what to keep of it."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    record = ApiKeyRecord(
        key_id=f"key-{secrets.token_hex(8)}",
        key_hash=hash_of(key),
        last_four=key[-4:],
        name=name,
        owner=owner,
        created_at=now,
        limits=limits,
        expires_at=expires_at,
    )
    return key, record


def hash_of(key: str) -> str:
    """SHA-256. A slow hash would protect guessable secrets; a key is 256 random bits, which nobody can search."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


@attrs.frozen(kw_only=True)
class _Known:
    """All keys as they were in the database at one moment."""

    by_hash: dict[str, ApiKeyRecord]
    by_id: dict[str, ApiKeyRecord]
    read_at: float


class KeyRing:
    """Finds the caller behind a key. Without any key ever made, everybody is the one local caller."""

    def __init__(self, store: KeyStore, clock: Clock, audit: AuditLog) -> None:
        self._store = store
        self._clock = clock
        self._audit = audit
        self._known: _Known | None = None
        self._reading: asyncio.Task[_Known] | None = None
        self._looking: asyncio.Task[_Known] | None = None
        self._never = asyncio.Event()

    async def demands_keys(self) -> bool:
        """Whether any key was ever made, revoked and expired ones included."""
        return bool((await self._current()).by_id)

    async def caller_with_key(self, key: str) -> Caller:
        """Who holds a key; raises `AuthenticationError` for one that is unknown, revoked or expired."""
        hashed = hash_of(key)
        known = await self._current()
        if not known.by_id:
            return LOCAL_CALLER
        record = _find(known, hashed) or _find(await self._look_again(known), hashed)
        if record is None:
            raise AuthenticationError("this API key is not known here; ask the server's operator for one")
        return self._caller(record, invalid_token=False)

    async def caller_with_key_id(self, key_id: str) -> Caller:
        """Who holds the key that a token was issued for; raises `AuthenticationError` likewise."""
        record = (await self._current()).by_id.get(key_id)
        if record is None:
            raise AuthenticationError("the key of this token is not known here", invalid_token=True)
        return self._caller(record, invalid_token=True)

    async def record(self, key_id: str) -> tuple[int, ApiKeyRecord]:
        """A key's number, which never changes, and what is kept of it; raises `UnknownKeyError`."""
        number = await self._store.number_of(key_id)
        record = (await self._read()).by_id.get(key_id)
        if record is None:
            raise UnknownKeyError(key_id)
        return number, record

    async def issue(self, key_id: str | None, name: str, expires_at: datetime) -> IssuedKey | None:
        """A key with owner and limits of another one; None for no key, which is all that a server without keys has.

        Raises `AuthenticationError` when the other key opens nothing any more.
        """
        if key_id is None:
            return None
        caller = await self.caller_with_key_id(key_id)
        key, record = new_key(caller.owner, name, self._clock.now(), limits=caller.limits, expires_at=expires_at)
        await self._store.add(record)
        return IssuedKey(key=key, key_id=record.key_id)

    async def extend(self, key_id: str, expires_at: datetime) -> None:
        """Let a key expire at another time; raises `UnknownKeyError`."""
        await self._store.extend(key_id, expires_at)
        await self._read()

    async def revoke(self, key_id: str) -> None:
        """Make a key useless at once; raises `UnknownKeyError`."""
        record = await self._store.revoke(key_id, self._clock.now())
        await self._read()
        self._audit.record("key_revoked", owner=record.owner, key_id=key_id, details={"name": record.name})

    def _caller(self, record: ApiKeyRecord, *, invalid_token: bool) -> Caller:
        refusal = record.refusal(self._clock.now())
        if refusal is not None:
            raise AuthenticationError(f"this API key is {refusal}", invalid_token=invalid_token)
        return Caller(owner=record.owner, key_id=record.key_id, limits=record.limits)

    def _age(self, known: _Known) -> float:
        return self._clock.monotonic() - known.read_at

    async def _current(self) -> _Known:
        known = self._known
        if known is None:
            return await asyncio.shield(self._start_reading())
        if self._age(known) >= STALE_SECONDS:
            try:
                return await asyncio.shield(self._start_reading())
            except DatabaseUnavailableError:
                if self._age(known) >= OUTAGE_SECONDS:
                    raise
                return known
        if self._age(known) >= REFRESH_SECONDS:
            self._start_reading()
        return known

    async def _read(self) -> _Known:
        """The keys as they are now. Who finds a reading in progress, which may have begun too early, waits for two."""
        if self._reading is not None:
            await asyncio.shield(self._reading)
        return await asyncio.shield(self._start_reading())

    async def _look_again(self, known: _Known) -> _Known:
        """The keys as they are after now, for everybody who looks for an unknown one at the same time."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._wait_and_read(known.read_at + UNKNOWN_KEY_SECONDS))
        return await asyncio.shield(self._looking)

    async def _wait_and_read(self, not_before: float) -> _Known:
        await self._clock.wait(self._never, not_before)
        self._looking = None  # who comes from here on must wait for a later reading
        return await self._read()

    def _start_reading(self) -> asyncio.Task[_Known]:
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_store())
            self._reading.add_done_callback(_report)
        return self._reading

    async def _read_store(self) -> _Known:
        began = self._clock.monotonic()
        try:
            records = await self._store.list()
        finally:
            self._reading = None
        self._known = _Known(
            by_hash={record.key_hash: record for record in records},
            by_id={record.key_id: record for record in records},
            read_at=began,
        )
        return self._known


def _report(reading: asyncio.Task[_Known]) -> None:
    """Nobody may be waiting for a reading that fails; the next one is tried when the keys are needed again."""
    if not reading.cancelled() and reading.exception() is not None:
        log.error("cannot read the API keys: %s", reading.exception())


def _find(known: _Known, hashed: str) -> ApiKeyRecord | None:
    """The table's own comparison may stop early, but only on a hash that the sender cannot choose digit by digit."""
    record = known.by_hash.get(hashed)
    return record if record is not None and hmac.compare_digest(record.key_hash, hashed) else None
