"""A server that demands keys, in a thread, and clients that hold one each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import httpx

from tests.server.conftest import Api, open_api
from tinker_core.engine.clock import SystemClock
from tinker_core.engine.keyring import new_key
from tinker_core.storage import ControlStore, database_url
from tinker_core.types import KeyLimits


@attrs.frozen(kw_only=True)
class Tenant(Api):
    """An owner with a key."""

    owner: str
    key: str
    key_id: str


def make_key(data_dir: Path, owner: str, limits: KeyLimits | None = None, url: str | None = None) -> tuple[str, str]:
    """A new key in a data directory, or at a URL, as ``tinker-server keys create`` makes it, and its id."""

    async def make() -> tuple[str, str]:
        control = await ControlStore.open(url or database_url(data_dir))
        try:
            key, record = new_key(owner, f"of {owner}", datetime.now(UTC), limits=limits or KeyLimits())
            await control.keys.add(record)
        finally:
            await control.close()
        return key, record.key_id

    return asyncio.run(make())


class ShiftedClock(SystemClock):
    """The machine's clock, which a test may put forward from its own thread."""

    def __init__(self) -> None:
        self.shift = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.shift

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self.shift)


@contextlib.contextmanager
def serve_tenants(
    data_dir: Path, owners: Mapping[str, KeyLimits | None], **options: Any
) -> Iterator[dict[str, Tenant]]:
    """A server and one tenant for each owner; ``options`` are those of `open_api`."""
    url = options.get("engine", {}).get("database_url")
    keys = {owner: make_key(data_dir, owner, limits, url) for owner, limits in owners.items()}
    with open_api(data_dir, **options) as api, contextlib.ExitStack() as stack:
        tenants = {}
        for owner, (key, key_id) in keys.items():
            http = stack.enter_context(httpx.Client(base_url=api.url, timeout=60, headers={"x-api-key": key}))
            tenants[owner] = Tenant(url=api.url, http=http, owner=owner, key=key, key_id=key_id)
        yield tenants
