"""Short names for what the tests of the journal do."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

from tinker_core.storage.journal import AcceptedRow, Fate, Journal, ModelRow, ResultRow

SMALL = 1_000
LARGE = 100_000
"""Of a body in the database and of one in a file."""


def run(body: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 120))


@asynccontextmanager
async def journal(directory: Path, **settings: int) -> AsyncIterator[Journal]:
    opened = await Journal.open(directory, **{"max_bytes": 2**30, "reserve_bytes": 0, **settings})
    try:
        yield opened
    finally:
        await opened.close()


def noise(number: int, size: int) -> bytes:
    """Bytes that say which request they belong to."""
    block = hashlib.sha256(str(number).encode()).digest()
    return (block * (size // len(block) + 1))[:size]


def request(
    number: int, place: int, *, size: int | None = SMALL, model: str | None = "m", **fields: str
) -> AcceptedRow:
    return AcceptedRow(
        number=number,
        scope=fields.get("scope", "owner|session"),
        place=place,
        owner="owner",
        model_id=model,
        seq_id=None if model is None else place,
        group=fields.get("group"),
        head=b"head %d" % number,
        body=None if size is None else noise(number, size),
    )


def answer(
    number: int, fate: Fate = Fate.KEEP, *, size: int = 100, owner: str = "owner", until: float = 10.0
) -> ResultRow:
    return ResultRow(number=number, owner=owner, payload=noise(-number, size), fate=fate, keep_until=until)


def model(next_seq_id: int, name: str = "m") -> ModelRow:
    return ModelRow(model_id=name, next_seq_id=next_seq_id, state=b"state %d" % next_seq_id)


async def accepted(journal: Journal, place: int, **fields: object) -> int:
    """Accept a new request and return its number."""
    row = request(journal.next_number(), place, **fields)  # type: ignore[arg-type]
    assert await journal.accept(row) is None
    return row.number


async def resolved(journal: Journal, place: int, fate: Fate = Fate.KEEP, **fields: object) -> int:
    number = await accepted(journal, place, **fields)
    await journal.resolve([answer(number, fate)])
    return number


def filled(directory: Path, fill: Callable[[Journal], Awaitable[None]], *, crash: bool = False) -> Path:
    """A journal's directory after ``fill``; with ``crash`` as a power cut would have left it, with its log."""
    copy = directory.with_name(f"{directory.name}-copy")

    async def main() -> None:
        async with journal(directory) as opened:
            await fill(opened)
            # Another process copies: closing a database's file here would drop the locks that SQLite holds on it.
            copying = await asyncio.create_subprocess_exec("cp", "-r", str(directory), str(copy))
            assert await copying.wait() == 0

    run(main())
    if not crash:
        shutil.rmtree(copy)
        return directory
    shutil.rmtree(directory)
    return copy
