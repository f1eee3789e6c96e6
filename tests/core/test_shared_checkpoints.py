"""Checkpoints of two servers on one control database: each looks after its own files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.core.checkpoint_lab import NOON, Lab, open_lab, path_of
from tinker_core.engine.identity import shared_store
from tinker_core.errors import ForeignCheckpointError
from tinker_core.types import LOCAL_OWNER, ServerRecord

HOUR = 3600


@asynccontextmanager
async def open_two(tmp_path: Path, database: str, store: str | None, **options: Any) -> AsyncIterator[tuple[Lab, Lab]]:
    """Two servers, whose checkpoint store is known to others as ``store``."""
    names = ("first", "second")
    opened = [open_lab(tmp_path / name, database=database, writer=name, server_id=name, **options) for name in names]
    async with opened[0] as first, opened[1] as second:
        for name, lab in zip(names, (first, second), strict=True):
            await lab.control.servers.register(ServerRecord(server_id=name, created_at=NOON, store=store), known=False)
        yield first, second


def files(directory: Path) -> int:
    return len(list(directory.rglob("a.safetensors")))


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


def test_what_expires_or_is_removed_elsewhere_is_cleared_up_where_its_files_are(tmp_path: Path, database: str) -> None:
    async def body() -> None:
        async with open_two(tmp_path, database, None) as (first, second):
            await first.save("expires", "x", "r1", ttl_seconds=HOUR)
            await first.save("removed", "x", "r2")
            await first.save("stays", "x", "r3")
            await second.checkpoints.delete(str(path_of("removed")), LOCAL_OWNER)
            for lab in (first, second):
                await lab.clock.advance(HOUR + 1)
            assert await second.housekeeping.tidy() is None
            assert await second.names() == ["expires", "stays"]
            assert files(tmp_path / "first") == 3
            await first.housekeeping.tidy()
            assert await second.names() == ["stays"]
            assert files(tmp_path / "first") == 1

    run(body)


def test_files_are_read_only_where_they_can_be(tmp_path: Path, database: str) -> None:
    async def own_stores() -> None:
        async with open_two(tmp_path, database, None) as (first, second):
            await first.save("one", "x", "r1")
            assert await first.read("one") == "x"
            with pytest.raises(ForeignCheckpointError, match="first"):
                await second.read("one")
            record = await second.record("one")
            assert record is not None
            with pytest.raises(ForeignCheckpointError):
                await second.checkpoints.sizes(record)

    async def one_store() -> None:
        url = f"file://{tmp_path / 'shared'}"  # stands for a remote one
        async with open_two(tmp_path, database, "s3://bucket/prefix", url=url) as (first, second):
            await first.save("two", "y", "r2")
            assert await second.read("two") == "y"

    run(own_stores)
    run(one_store)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (None, None),
        ("file:///mnt/shared", None),
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3://id:s3cr3t@bucket/prefix?region=x", "s3://bucket/prefix"),
    ],
)
def test_a_store_is_known_to_other_servers_by_a_name_without_credentials(url: str | None, name: str | None) -> None:
    assert shared_store(url) == name
