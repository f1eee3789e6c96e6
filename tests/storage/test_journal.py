from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import attrs
import pytest

from tests.storage.journals import (
    LARGE,
    SMALL,
    accepted,
    answer,
    journal,
    model,
    noise,
    request,
    resolved,
    run,
)
from tinker_core.errors import ConfigurationError, JournalError, JournalFullError
from tinker_core.storage.journal import AcceptedRow, Fate, Journal


def side_files(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "files").iterdir())


@pytest.mark.parametrize("size", [0, SMALL, LARGE])
def test_what_was_accepted_and_answered_is_there_after_a_restart(tmp_path: Path, size: int) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as first:
            number = await accepted(first, 1, size=size)
            await first.resolve([answer(number, size=size)])
            waiting = await accepted(first, 2, size=size)
            unreadable = await accepted(first, 3, size=None)
        async with journal(tmp_path / "j") as second:
            assert await second.head(number) == b"head %d" % number
            assert await second.body(number) == noise(number, size)
            assert await second.result(number) == noise(-number, size)
            assert await second.result(waiting) is None
            assert await second.body(unreadable) is None
            assert await second.head(12345) is await second.body(12345) is await second.result(12345) is None
            found = await second.recover()
            assert [(row.number, row.model_id, row.seq_id, row.has_body) for row in found.pending] == [
                (waiting, "m", 2, True),
                (unreadable, "m", 3, False),
            ]
            assert [(row.number, row.seq_id, row.fate) for row in found.replay] == [(number, 1, Fate.KEEP)]
            assert found.replay[0].head == b"head %d" % number
            assert found.damaged == ()

    run(main())


def test_numbers_grow_over_restarts_also_when_nothing_was_written_with_them(tmp_path: Path) -> None:
    async def main() -> None:
        last = 0
        for _ in range(3):
            async with journal(tmp_path / "j") as opened:
                for _ in range(3):
                    number = opened.next_number()
                    assert number > last
                    last = number

    run(main())


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_repeated_request_gets_the_head_of_the_first_and_writes_nothing(tmp_path: Path, size: int) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            first = request(opened.next_number(), 1, size=size)
            copies = [attrs.evolve(first, number=opened.next_number(), head=b"copy") for _ in range(4)]
            other_scope = attrs.evolve(first, number=opened.next_number(), scope="owner|other", head=b"other")
            other_place = attrs.evolve(first, number=opened.next_number(), place=2, head=b"other")
            heads = await asyncio.gather(*map(opened.accept, [first, *copies, other_scope, other_place]))
            assert heads.count(None) == 3, "one of the copies, whichever came first, and the two others"
            winner = await opened.accept(attrs.evolve(first, number=opened.next_number()))
            assert heads.count(winner) == 4
            assert opened.stats().pending == 3
            assert opened.stats().body_bytes == 3 * size
            assert len(side_files(tmp_path / "j")) == (3 if size == LARGE else 0)

    run(main())


def test_scopes_with_the_same_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinker_core.storage.journal.transaction.scope_hash", lambda scope: 1)

    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            await accepted(opened, 1, scope="a")
            await accepted(opened, 1, scope="b")
            again = await opened.accept(request(opened.next_number(), 1, scope="a"))
            assert again is not None

    run(main())


def test_a_snapshot_drops_the_bodies_that_it_covers_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            numbers = [await accepted(opened, place, size=LARGE) for place in range(4)]
            other = await resolved(opened, 0, model="n", scope="other")
            await opened.resolve([answer(numbers[0]), answer(numbers[2]), answer(numbers[3])])
            await opened.put_models([model(3)])
            assert [await opened.body(number) is None for number in numbers] == [True, False, True, False]
            assert await opened.body(other) is not None
            assert len(side_files(tmp_path / "j")) == 2
            late = opened.resolve([answer(numbers[1])])
            await late
            assert await opened.body(numbers[1]) is None, "the snapshot that came first covers it"
            found = await opened.recover()
            assert [row.number for row in found.replay] == [numbers[3], other]
            assert found.models == (model(3),)
            assert await opened.result(numbers[0]) == noise(-numbers[0], 100)

    run(main())


def test_results_and_the_snapshot_that_covers_them_are_one_transaction(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            number = await accepted(opened, 0)
            await opened.resolve([answer(number)], [model(1)])
            assert opened.stats().body_bytes == 0
            assert (await opened.recover()).replay == ()
            assert await opened.result(number) is not None

    run(main())


def test_fates(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            keep = await resolved(opened, 0, Fate.KEEP)
            place = await resolved(opened, 1, Fate.PLACE)
            drop = await resolved(opened, 2, Fate.DROP)
            sample = await resolved(opened, 3, Fate.KEEP, model=None)
            loss = await resolved(opened, 4, Fate.KEEP, model=None, group="session")
            bodies = [await opened.body(number) is not None for number in (keep, place, drop, sample, loss)]
            assert bodies == [True, False, False, False, True]
            found = await opened.recover()
            assert [(row.number, row.fate) for row in found.replay] == [(keep, Fate.KEEP), (place, Fate.PLACE)]
            assert [(row.number, row.group, row.head) for row in found.groups] == [(loss, "session", b"head %d" % loss)]
            await opened.prune(11.0)
            assert [await opened.head(number) is not None for number in (keep, place, drop, sample, loss)] == [
                True,
                True,
                False,
                False,
                True,
            ]
            await opened.forget_group("another")
            assert await opened.body(loss) is not None
            await opened.forget_group("session")
            assert await opened.head(loss) is None
            await opened.forget_model("m")
            assert await opened.head(keep) is await opened.head(place) is None
            stats = opened.stats()
            assert (stats.body_bytes, stats.result_bytes, stats.pending, stats.results) == (0, 0, 0, 0)

    run(main())


def test_a_forgotten_model_keeps_its_pending_requests(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            waiting = await accepted(opened, 0)
            await resolved(opened, 1)
            await opened.put_models([model(0)])
            await opened.forget_model("m")
            found = await opened.recover()
            assert ([row.number for row in found.pending], found.replay, found.models) == ([waiting], (), ())

    run(main())


def test_a_request_has_one_result_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            for size in (SMALL, LARGE):
                number = await accepted(opened, size)
                first, second = answer(number, size=size), answer(number, size=size + 1)
                await asyncio.gather(opened.resolve([first, second]), opened.resolve([second]))
                await opened.resolve([second])
                assert await opened.result(number) == first.payload
                await opened.prune(11.0)
                await opened.resolve([second])
                assert await opened.result(number) is None
            await opened.resolve([answer(opened.next_number(), size=LARGE)])
            assert opened.stats().results == 0
            assert side_files(tmp_path / "j") == []

    run(main())


def test_attempts_are_counted_for_pending_requests(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            first, second = await accepted(opened, 0), await accepted(opened, 1)
            await opened.note_attempts([first, second])
            await opened.note_attempts([first])
            assert [row.attempts for row in (await opened.recover()).pending] == [2, 1]

    run(main())


def test_results_are_pruned_when_their_time_is_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            assert await opened.prune(1.0) is None
            numbers = await asyncio.gather(*(accepted(opened, place, model=None) for place in range(1200)))
            rows = [answer(number, Fate.DROP, until=float(index)) for index, number in enumerate(numbers)]
            await opened.resolve(rows)
            opened.delivered(numbers[1], 5000.0)
            assert await opened.prune(1100.0) == 1101.0
            assert opened.stats().results == 100
            assert await opened.result(numbers[1]) is not None, "it was delivered, and is kept for a retry"
            assert await opened.head(numbers[0]) is None
            again = await opened.accept(request(opened.next_number(), 0, model=None))
            assert again is None, "nothing knows of the first any more"
            assert await opened.prune(4000.0) == 5000.0

    run(main())


def test_beyond_the_bound_requests_are_refused_and_results_still_written(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j", max_bytes=3 * LARGE) as opened:
            numbers = [await accepted(opened, place, size=LARGE) for place in range(3)]
            for size in (SMALL, LARGE):
                with pytest.raises(JournalFullError, match="--journal-bytes"):
                    await opened.accept(request(opened.next_number(), 9, size=size))
                again = await opened.accept(request(opened.next_number(), 0, size=size))
                assert again == b"head %d" % numbers[0], "a repeated request needs no room"
            await opened.resolve([answer(number, size=LARGE) for number in numbers])
            assert await opened.result(numbers[2]) == noise(-numbers[2], LARGE)
            await opened.put_models([model(3)])
            await opened.prune(11.0)
            await accepted(opened, 9, size=LARGE)
            assert opened.stats().file_bytes == opened.stats().body_bytes == LARGE
            assert len(side_files(tmp_path / "j")) == 1

    run(main())


def test_whoever_keeps_most_results_loses_the_oldest(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j", max_result_bytes=10_000) as opened:
            numbers = {}
            for place, (owner, size) in enumerate([("a", 2_000), ("b", 3_000), ("b", 3_000), ("b", 3_000)]):
                number = await accepted(opened, place, model=None)
                await opened.resolve([answer(number, Fate.DROP, size=size, owner=owner)])
                numbers[place] = number
            kept = [place for place, number in numbers.items() if await opened.result(number) is not None]
            assert kept == [0, 2, 3]
            huge = await accepted(opened, 9, model=None)
            await opened.resolve([answer(huge, Fate.DROP, size=LARGE, owner="c")])
            assert await opened.result(huge) is not None, "a result is never dropped as it comes"

    run(main())


def test_what_waits_is_committed_together_and_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            numbers = await asyncio.gather(*(accepted(opened, place) for place in range(200)))
            await asyncio.gather(*(opened.resolve([answer(number)]) for number in numbers))
            done = [opened.put_models([model(5)]), opened.put_models([model(3)]), opened.forget_model("m")]
            done.append(opened.put_models([model(9)]))
            await done[-1]
            assert all(future.done() for future in done)
            assert (await opened.recover()).models == (model(9),)
            stats = opened.stats()
            assert stats.commits < 100
            assert stats.largest_batch > 50
            assert (stats.waiting, stats.waiting_seconds) == (0, 0.0)

    run(main())


def test_closing_finishes_what_was_appended(tmp_path: Path) -> None:
    async def main() -> None:
        opened = await Journal.open(tmp_path / "j", max_bytes=2**30, reserve_bytes=0)
        numbers = [await accepted(opened, place) for place in range(3)]
        futures = [opened.resolve([answer(number)]) for number in numbers]
        opened.delivered(numbers[0], 99.0)
        await opened.close()
        assert all(future.done() for future in futures)
        with pytest.raises(JournalError, match="closed"):
            await opened.resolve([answer(numbers[0])])
        async with journal(tmp_path / "j") as again:
            assert await again.prune(50.0) == 99.0
            assert [await again.result(number) is not None for number in numbers] == [True, False, False]

    run(main())


def test_a_cancelled_request_leaves_no_file_behind(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            task = asyncio.create_task(opened.accept(request(opened.next_number(), 0, size=LARGE)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await accepted(opened, 1, size=LARGE)
        assert len(side_files(tmp_path / "j")) == 1

    run(main())


def test_files_that_no_record_names_are_swept(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            await resolved(opened, 0, size=LARGE)
        kept = side_files(tmp_path / "j")
        (tmp_path / "j" / "files" / f"{7:016x}.body").write_bytes(b"half")
        (tmp_path / "j" / "files" / f"{7:016x}.result").write_bytes(b"half")
        async with journal(tmp_path / "j"):
            assert side_files(tmp_path / "j") == kept

    run(main())


def test_a_large_database_of_mostly_unused_pages_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinker_core.storage.journal.committing._MUCH_UNUSED", 100)

    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            numbers = await asyncio.gather(*(accepted(opened, place, size=20_000) for place in range(300)))
            await opened.resolve([answer(number) for number in numbers])
            last = await accepted(opened, 300, size=20_000)
            await opened.put_models([model(300)])
            for _ in range(10):
                await opened.note_attempts([last])
            assert await opened.body(last) == noise(last, 20_000)
        assert (tmp_path / "j" / "journal.sqlite").stat().st_size < 2_000_000

    run(main())


def test_a_large_cover_is_complete_at_once_and_dropped_bit_by_bit(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            numbers = await asyncio.gather(*(accepted(opened, place) for place in range(1000)))
            await opened.resolve([answer(number) for number in numbers])
            await opened.put_models([model(990)])
            assert [row.seq_id for row in (await opened.recover()).replay] == list(range(990, 1000))
        async with journal(tmp_path / "j") as opened:
            for _ in range(10):
                await opened.note_attempts([numbers[0]])
            assert opened.stats().body_bytes == 10 * SMALL

    run(main())


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal(tmp_path / "j"):
            pass
        with sqlite3.connect(tmp_path / "j" / "journal.sqlite") as connection:
            connection.execute("UPDATE meta SET version = 99")
        connection.close()
        with pytest.raises(ConfigurationError, match="format 99"):
            await Journal.open(tmp_path / "j", max_bytes=1)

    run(main())


def test_impossible_rows_are_refused_before_they_wait() -> None:
    with pytest.raises(ValueError, match="both or neither"):
        attrs.evolve(request(1, 1), seq_id=None)
    with pytest.raises(ValueError, match="64 bits"):
        request(2**63, 1)
    with pytest.raises(ValueError, match="scope"):
        AcceptedRow(number=1, scope="\ud800", place=1, owner="o", model_id=None, seq_id=None, head=b"", body=None)
