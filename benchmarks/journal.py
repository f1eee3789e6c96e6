"""What it costs to make a request durable, and that it costs the same however many results are stored.

Appends: `Journal.accept` by one writer, 16 and 64 at a time, small and large, beside a bare file that is written and
synced for each record, and beside the same journal with every payload inside its database. Stored results: accepting
and answering a request in journals that hold 100, 10,000 and 1,000,000 results, in turns, and 100 random ones fetched.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from support.report import report

from tinker_core.storage.journal import AcceptedRow, Fate, Journal, ResultRow

GOAL = 1.1
"""Cost of a request with the most stored results, divided by that with the fewest."""
KIB = 1024
SIZES = (4 * KIB, 256 * KIB)
WRITERS = (1, 16, 64)
SECONDS = 3.0
AT_ONCE = 5000
NEVER_INLINE_BYTES = 1 << 40
NUM_FETCHED = 100


def request(journal: Journal, place: int, body: bytes | None) -> AcceptedRow:
    number = journal.next_number()
    scope = f"owner|session-{place % 1000}"
    head = b"h" * 200
    return AcceptedRow(
        number=number, scope=scope, place=number, owner="owner", model_id=None, seq_id=None, head=head, body=body
    )


def result(number: int) -> ResultRow:
    payload = b"%020d" % number * 10
    return ResultRow(number=number, owner="owner", payload=payload, fate=Fate.DROP, keep_until=time.time() + 86400)


async def latencies(write: Callable[[int], Awaitable[object]], writers: int) -> dict[str, float]:
    """Microseconds per record of so many concurrent writers, and records per second."""
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS

    async def writer(index: int) -> None:
        while (started := time.perf_counter()) < end:
            await write(index)
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(writer(index) for index in range(writers)))
    elapsed = time.perf_counter() - started
    cuts = statistics.quantiles(seconds, n=100)
    return {
        "p50_us": round(1e6 * cuts[49], 1),
        "p99_us": round(1e6 * cuts[98], 1),
        "per_second": round(len(seconds) / elapsed, 1),
    }


async def bare_file(directory: Path, size: int) -> dict[str, float]:
    """One writer that appends to a file and syncs it, without any index or thread."""
    descriptor = os.open(directory / f"bare-{size}", os.O_WRONLY | os.O_CREAT)
    body = os.urandom(size)

    async def write(_: int) -> None:
        os.write(descriptor, body)
        os.fdatasync(descriptor)

    try:
        return await latencies(write, 1)
    finally:
        os.close(descriptor)


async def appends(directory: Path, size: int, writers: int, inline_bytes: int | None) -> dict[str, float]:
    settings = {} if inline_bytes is None else {"inline_bytes": inline_bytes}
    journal = await Journal.open(directory / f"appends-{size}-{writers}-{inline_bytes}", max_bytes=1 << 40, **settings)
    body = os.urandom(size)
    try:
        return await latencies(lambda index: journal.accept(request(journal, index, body)), writers)
    finally:
        await journal.close()


async def fill(journal: Journal, num: int) -> list[int]:
    numbers: list[int] = []
    for start in range(0, num, AT_ONCE):
        rows = [request(journal, place, None) for place in range(start, min(num, start + AT_ONCE))]
        await asyncio.gather(*(journal.accept(row) for row in rows))
        await journal.resolve([result(row.number) for row in rows])
        numbers += [row.number for row in rows]
    return numbers


async def fetch(journal: Journal, numbers: list[int], rng: random.Random) -> float:
    """Median microseconds of reading back random results; raises `RuntimeError` for a wrong one."""
    seconds = []
    for number in rng.sample(numbers, NUM_FETCHED):
        started = time.perf_counter()
        payload = await journal.result(number)
        seconds.append(time.perf_counter() - started)
        if payload != result(number).payload:
            raise RuntimeError(f"result {number} came back as {payload!r}")
    return 1e6 * statistics.median(seconds)


async def stored_results(directory: Path, sizes: list[int], rounds: int) -> dict[str, dict[str, float]]:
    journals = [await Journal.open(directory / f"stored-{size}", max_bytes=1 << 40) for size in sizes]
    try:
        numbers = [await fill(journal, size) for journal, size in zip(journals, sizes, strict=True)]
        rng = random.Random(0)
        seconds: dict[int, list[float]] = {index: [] for index in range(len(sizes))}
        body = os.urandom(4 * KIB)
        for place in range(rounds):
            for index in rng.sample(range(len(sizes)), len(sizes)):
                journal = journals[index]
                row = request(journal, place, body)
                started = time.perf_counter()
                await journal.accept(row)
                await journal.resolve([result(row.number)])
                seconds[index].append(time.perf_counter() - started)
        return {
            str(size): {
                "accept_and_resolve_us": round(1e6 * statistics.median(seconds[index][rounds // 5 :]), 1),
                "fetch_us": round(await fetch(journals[index], numbers[index], rng), 1),
                "database_mib": round((directory / f"stored-{size}" / "journal.sqlite").stat().st_size / KIB / KIB, 1),
            }
            for index, size in enumerate(sizes)
        }
    finally:
        for journal in journals:
            await journal.close()


async def measure(directory: Path, most_stored: int, rounds: int) -> dict[str, object]:
    bare = {f"{size // KIB}_kib": await bare_file(directory, size) for size in SIZES}
    journal = {
        f"{size // KIB}_kib": {str(writers): await appends(directory, size, writers, None) for writers in WRITERS}
        for size in SIZES
    }
    inline = {str(writers): await appends(directory, SIZES[1], writers, NEVER_INLINE_BYTES) for writers in WRITERS}
    sizes = [size for size in (100, 10_000, 1_000_000) if size <= most_stored]
    stored = await stored_results(directory, sizes, rounds)
    costs = [figures["accept_and_resolve_us"] for figures in stored.values()]
    return {
        "bare_file": bare,
        "journal_by_writers": journal,
        "256_kib_inside_the_database": inline,
        "stored_results": stored,
        "ratio": round(costs[-1] / costs[0], 3),
        "goal": GOAL,
        "reference": f"the same with {sizes[0]} stored results",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="not used: the journal knows no device")
    parser.add_argument("--directory", type=Path, help="where to write; decides which disk is measured")
    parser.add_argument("--most-stored", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        results = asyncio.run(measure(Path(directory), arguments.most_stored, arguments.rounds))
    report("journal", "cpu", results)


if __name__ == "__main__":
    main()
