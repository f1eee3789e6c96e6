"""API keys in a running server: known without the database, forgotten in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.core.conftest import ManualClock
from tinker_core.engine.audit import AuditLog
from tinker_core.engine.keyring import OUTAGE_SECONDS, STALE_SECONDS, UNKNOWN_KEY_SECONDS, KeyRing, hash_of, new_key
from tinker_core.errors import AuthenticationError, DatabaseUnavailableError, UnknownKeyError
from tinker_core.storage import ControlStore, database_url
from tinker_core.types import LOCAL_CALLER, Caller, KeyLimits


@attrs.frozen
class Lab:
    control: ControlStore
    clock: ManualClock
    ring: KeyRing
    audit: AuditLog
    readings: list[int]

    async def make(self, owner: str = "ann", **kwargs: Any) -> tuple[str, str]:
        key, record = new_key(owner, "", self.clock.now(), **kwargs)
        await self.control.keys.add(record)
        return key, record.key_id

    async def refusal(self, key: str) -> str:
        """Why a key is refused, when the time has come to look for it once more."""
        asking = asyncio.create_task(self.ring.caller_with_key(key))
        await asyncio.sleep(0)
        await self.clock.advance(UNKNOWN_KEY_SECONDS)
        with pytest.raises(AuthenticationError) as caught:
            await asking
        return str(caught.value)


@asynccontextmanager
async def open_lab(data_dir: Path) -> AsyncIterator[Lab]:
    control = await ControlStore.open(database_url(data_dir))
    clock = ManualClock()
    readings: list[int] = []
    read = control.keys.list

    async def counting() -> Any:
        readings.append(1)
        return await read()

    control.keys.list = counting  # type: ignore[method-assign]
    try:
        async with AuditLog(control.audit, clock) as audit:
            yield Lab(control, clock, KeyRing(control.keys, clock, audit), audit, readings)
    finally:
        await control.close()


def test_keys_are_256_random_bits_and_only_their_hash_is_kept(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_lab(tmp_path) as lab:
            key, key_id = await lab.make()
            assert key.startswith("tml-")
            assert len(key) == 4 + 43
            (record,) = await lab.control.keys.list()
            assert (record.key_id, record.key_hash, record.last_four) == (key_id, hash_of(key), key[-4:])
            assert record.key_hash not in repr(record)
            keys.append(key)

    keys: list[str] = []
    asyncio.run(body())
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert keys[0][4:].encode() not in content


def test_without_any_key_everybody_is_the_local_user_until_the_first_is_made(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_lab(tmp_path) as lab:
            assert not await lab.ring.demands_keys()
            assert await lab.ring.caller_with_key("tml-anything") == LOCAL_CALLER
            key, key_id = await lab.make()
            await lab.clock.advance(STALE_SECONDS)
            assert await lab.ring.demands_keys()
            assert "not known" in await lab.refusal("tml-anything")
            await lab.ring.revoke(key_id)
            assert await lab.ring.demands_keys(), "a revoked key must not open the server to everybody again"
            assert "revoked" in await lab.refusal(key)

    asyncio.run(body())


def test_a_key_names_its_owner_and_its_limits(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_lab(tmp_path) as lab:
            limits = KeyLimits(max_models=2, max_requests_per_second=0.5)
            key, key_id = await lab.make(limits=limits)
            expected = Caller(owner="ann", key_id=key_id, limits=limits)
            assert await lab.ring.caller_with_key(key) == expected
            assert await lab.ring.caller_with_key_id(key_id) == expected
            number, record = await lab.ring.record(key_id)
            assert (number, record.owner) == (1, "ann")
            with pytest.raises(UnknownKeyError):
                await lab.ring.record("key-none")

    asyncio.run(body())


def test_known_keys_need_no_database_and_wrong_ones_hardly_any(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_lab(tmp_path) as lab:
            key, _ = await lab.make()
            for _ in range(50):
                await lab.ring.caller_with_key(key)
            assert len(lab.readings) == 1
            guesses = [asyncio.create_task(lab.ring.caller_with_key(f"tml-{guess}")) for guess in range(50)]
            await asyncio.sleep(0)
            new, _ = await lab.make("ben")
            newcomer = asyncio.create_task(lab.ring.caller_with_key(new))
            await asyncio.sleep(0)
            await lab.clock.advance(UNKNOWN_KEY_SECONDS)
            assert (await newcomer).owner == "ben"
            assert {type(answer) for answer in await asyncio.gather(*guesses, return_exceptions=True)} == {
                AuthenticationError
            }
            assert len(lab.readings) == 2

    asyncio.run(body())


def test_new_revoked_and_expired_keys_are_noticed_in_time(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_lab(tmp_path) as lab:
            first, first_id = await lab.make()
            await lab.ring.caller_with_key(first)
            second, _ = await lab.make("ben", expires_at=lab.clock.now() + timedelta(seconds=100))
            await lab.clock.advance(UNKNOWN_KEY_SECONDS)
            assert (await lab.ring.caller_with_key(second)).owner == "ben"
            await lab.control.keys.revoke(first_id, lab.clock.now())  # as another process would
            await lab.clock.advance(STALE_SECONDS)
            assert "revoked" in await lab.refusal(first)
            await lab.clock.advance(100)
            assert "expired" in await lab.refusal(second)

    asyncio.run(body())


def test_a_server_that_is_busy_never_waits_for_the_database(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_lab(tmp_path) as lab:
            key, _ = await lab.make()
            await lab.ring.caller_with_key(key)
            blocked = asyncio.Event()
            read = lab.control.keys.list

            async def slow() -> Any:
                await blocked.wait()
                return await read()

            lab.control.keys.list = slow  # type: ignore[method-assign]
            await lab.clock.advance(STALE_SECONDS - 1)
            assert (await lab.ring.caller_with_key(key)).owner == "ann"
            blocked.set()
            await lab.ring.record((await lab.ring.caller_with_key(key)).key_id or "")

    asyncio.run(body())


def test_revoking_is_immediate_and_in_the_audit_log(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_lab(tmp_path) as lab:
            key, key_id = await lab.make()
            await lab.ring.caller_with_key(key)
            await lab.ring.revoke(key_id)
            assert "revoked" in await lab.refusal(key)
            with pytest.raises(AuthenticationError) as caught:
                await lab.ring.caller_with_key_id(key_id)
            assert caught.value.invalid_token
            with pytest.raises(UnknownKeyError):
                await lab.ring.revoke("key-none")
            now = lab.clock.now()
            entries = await lab.audit.entries("ann", now - timedelta(minutes=1), now + timedelta(minutes=1))
            assert [(entry.event, entry.category) for entry in entries] == [("key_revoked", "organizations")]

    asyncio.run(body())


def test_known_keys_open_for_a_while_when_the_database_is_away(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_lab(tmp_path) as lab:
            key, _ = await lab.make()
            caller = await lab.ring.caller_with_key(key)
            read = lab.control.keys.list

            async def away() -> Any:
                raise DatabaseUnavailableError

            lab.control.keys.list = away  # type: ignore[method-assign]
            await lab.clock.advance(OUTAGE_SECONDS - 1)
            assert await lab.ring.caller_with_key(key) == caller
            asking = asyncio.create_task(lab.ring.caller_with_key("tml-unknown"))
            await asyncio.sleep(0)
            await lab.clock.advance(UNKNOWN_KEY_SECONDS)
            with pytest.raises(DatabaseUnavailableError):
                await asking
            await lab.clock.advance(1)
            with pytest.raises(DatabaseUnavailableError):
                await lab.ring.caller_with_key(key)
            lab.control.keys.list = read  # type: ignore[method-assign]
            assert await lab.ring.caller_with_key(key) == caller

    asyncio.run(body())
