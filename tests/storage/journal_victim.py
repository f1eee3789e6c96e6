"""A process that journals and says so, until somebody kills it: ``python -m tests.storage.journal_victim DIRECTORY``.

Each line on standard input is a seed: a child is forked that opens the journal, prints ``pid N`` and goes on for ever.
It prints ``accepted NUMBER PLACE``, ``resolved NUMBER``, ``covered SEQ_ID`` after those are durable, and ``covering
SEQ_ID`` before that is asked for.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path

from tests.storage.journals import answer, model, noise, request
from tinker_core.storage.journal import Fate, Journal

SIZES = (100, 3_000, 30_000, 70_000, 200_000)


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def size_of(number: int) -> int:
    """Of the body and the result of a request."""
    return SIZES[noise(number, 1)[0] % len(SIZES)]


def fate_of(number: int) -> Fate:
    return (Fate.KEEP, Fate.KEEP, Fate.PLACE)[noise(number, 2)[1] % 3]


async def work(journal: Journal, rng: random.Random, first_place: int) -> None:
    place = first_place
    done = first_place
    while True:
        rows = []
        for _ in range(rng.randrange(1, 6)):
            number = journal.next_number()
            rows.append(request(number, place, size=size_of(number)))
            place += 1
        await asyncio.gather(*(_accept(journal, row.number, row.place) for row in rows))
        resolving = [
            journal.resolve([answer(row.number, fate_of(row.number), size=size_of(row.number))]) for row in rows
        ]
        for row, future in zip(rows, resolving, strict=True):
            await future
            say(f"resolved {row.number}")
        if rng.random() < 0.1:
            done = max(done, place - rng.randrange(5))
            say(f"covering {done}")
            await journal.put_models([model(done)])
            say(f"covered {done}")


async def _accept(journal: Journal, number: int, place: int) -> None:
    assert await journal.accept(request(number, place, size=size_of(number))) is None
    say(f"accepted {number} {place}")


async def live(directory: Path, seed: int) -> None:
    say(f"pid {os.getpid()}")
    journal = await Journal.open(directory, max_bytes=2**40, reserve_bytes=1_000_000)
    first_place = 0
    found = await journal.recover()
    rows = (*found.pending, *found.replay)
    first_place = max([row.seq_id or 0 for row in rows] + [row.next_seq_id for row in found.models], default=-1) + 1
    await work(journal, random.Random(seed), first_place)


def main() -> None:
    directory = Path(sys.argv[1])
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            asyncio.run(live(directory, int(line)))
        os.waitpid(child, 0)
        say("dead")


if __name__ == "__main__":
    main()
