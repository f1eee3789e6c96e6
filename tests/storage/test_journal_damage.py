"""Flipped bytes and torn tails: what is damaged is named or refused, and never applied."""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage.journals import LARGE, SMALL, accepted, filled, journal, model, noise, resolved, run
from tinker_core.errors import DamagedRecordError, JournalError
from tinker_core.storage.journal import Fate, Journal, Recovered

_FRAME = 24 + 4096


def flip(path: Path, position: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def overwrite(directory: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(directory / "journal.sqlite")
    with connection:
        assert connection.execute(statement, values).rowcount == 1
    connection.close()


def refused(directory: Path, match: str) -> None:
    async def main() -> None:
        with pytest.raises(JournalError, match=match):
            await Journal.open(directory, max_bytes=2**30)

    run(main())


async def five(opened: Journal) -> None:
    for place in range(5):
        await resolved(opened, place, Fate.KEEP, size=SMALL if place else LARGE)
    await accepted(opened, 5)
    await opened.put_models([model(0), model(0, "n")])


async def everything(opened: Journal) -> tuple[Recovered, dict[tuple[str, int], bytes | None]]:
    found = await opened.recover()
    blobs: dict[tuple[str, int], bytes | None] = {}
    for row in (*found.replay, *found.pending):
        for name, read in (("body", opened.body), ("result", opened.result)):
            try:
                blobs[name, row.number] = await read(row.number)
            except DamagedRecordError:
                blobs[name, row.number] = b"damaged"
    return found, blobs


def test_a_damaged_body_or_result_is_named_and_the_others_are_not_affected(tmp_path: Path) -> None:
    directory = filled(tmp_path / "j", five)
    first = (1 << 32) + 1
    overwrite(directory, "UPDATE bodies SET data = ? WHERE number = ?", noise(0, SMALL), first + 1)
    overwrite(directory, "UPDATE payloads SET data = ? WHERE number = ?", noise(-first, 100), first + 2)
    flip(directory / "files" / f"{first:016x}.body", 5)

    async def main() -> None:
        async with journal(directory) as opened:
            with pytest.raises(DamagedRecordError, match=f"body of request {first} in .*{first:016x}.body"):
                await opened.body(first)
            with pytest.raises(DamagedRecordError, match=f"body of request {first + 1} in .*journal.sqlite"):
                await opened.body(first + 1)
            with pytest.raises(DamagedRecordError, match=f"result of request {first + 2} in .*journal.sqlite"):
                await opened.result(first + 2)
            (directory / "files" / f"{first:016x}.body").unlink()
            with pytest.raises(DamagedRecordError, match="No such file"):
                await opened.body(first)
            for number in range(first + 2, first + 5):
                assert await opened.body(number) == noise(number, SMALL)
            assert (await opened.recover()).damaged == ()

    run(main())


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE requests SET head = x'00' WHERE number = ?", "request {0}"),
        ("UPDATE requests SET scope = 'other' WHERE number = ?", "request {0}"),
        ("DELETE FROM requests WHERE number = ?", "request {0}"),
        ("UPDATE live SET seq_id = 7 WHERE number = ?", "state of request {0}"),
        ("UPDATE live SET state = 'place' WHERE number = ?", "state of request {0}"),
        ("UPDATE live SET chk = 'text' WHERE number = ?", "state of request {0}"),
        ("UPDATE live SET model_id = cast(x'ff' AS TEXT) WHERE number = ?", "state of request {0}"),
    ],
)
def test_a_damaged_row_is_named_until_it_is_forgotten(tmp_path: Path, statement: str, named: str) -> None:
    directory = filled(tmp_path / "j", five)
    number = (1 << 32) + 2
    overwrite(directory, statement, number)

    async def main() -> None:
        for _ in range(2):
            async with journal(directory) as opened:
                found = await opened.recover()
                assert len(found.damaged) == 1
                assert named.format(number) in found.damaged[0]
                assert "journal.sqlite" in found.damaged[0]
                assert found.damaged_models == {"m"} or "ff" in statement
                assert number not in [row.number for row in found.replay]
                assert len(found.replay) == 4
        async with journal(directory) as opened:
            await opened.forget_damaged()
            found = await opened.recover()
            assert (found.damaged, len(found.replay), len(found.pending)) == ((), 4, 1)
            assert opened.stats().body_bytes == LARGE + 4 * SMALL
            assert await opened.body(number) is None

    run(main())


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    directory = filled(tmp_path / "j", five)
    overwrite(directory, "UPDATE models SET next_seq_id = 3 WHERE model_id = ?", "m")

    async def main() -> None:
        async with journal(directory) as opened:
            found = await opened.recover()
            assert (found.models, found.damaged_models) == ((model(0, "n"),), {"m"})
            await opened.forget_damaged()
            assert (await opened.recover()).damaged == ()

    run(main())


def test_rows_that_vanish_as_a_whole_are_missed(tmp_path: Path) -> None:
    directory = filled(tmp_path / "j", five)
    overwrite(directory, "DELETE FROM live WHERE number = ?", (1 << 32) + 2)

    async def main() -> None:
        async with journal(directory) as opened:
            with pytest.raises(JournalError, match=r"journal.sqlite.*7 open records instead of 8|open records"):
                await opened.recover()

    run(main())


def test_a_damaged_database_is_refused_by_name(tmp_path: Path) -> None:
    directory = filled(tmp_path / "j", five)
    whole = (directory / "journal.sqlite").read_bytes()
    (directory / "journal.sqlite").write_bytes(b"x" * 200 + whole[200:])
    refused(directory, r"journal.sqlite.* is damaged.*Restore")
    (directory / "journal.sqlite").write_bytes(whole[: len(whole) // 2])
    refused(directory, r"journal.sqlite.* is damaged.*Restore")
    (directory / "journal.sqlite").unlink()
    refused(directory, "empty or missing.*remove .*tail")
    (directory / "journal.sqlite").write_bytes(whole)

    async def main() -> None:
        async with journal(directory) as opened:
            assert len((await opened.recover()).replay) == 5

    run(main())


def test_a_byte_flipped_in_the_log_is_refused_until_the_loss_is_accepted(tmp_path: Path) -> None:
    directory = filled(tmp_path / "j", five, crash=True)
    log = directory / "journal.sqlite-wal"
    flip(log, 32 + 9 * _FRAME + 100)
    refused(directory, r"journal.sqlite-wal.*frame 10 at byte \d+ is damaged.*remove .*tail")
    refused(directory, "frame 10")
    (directory / "tail").unlink()

    async def main() -> None:
        async with journal(directory) as opened:
            found = await opened.recover()
            assert len(found.replay) + len(found.pending) < 6, "what was left of it"
            for row in found.replay:
                assert await opened.body(row.number) is not None
            await resolved(opened, 50)
        async with journal(directory) as opened:
            assert (await opened.recover()).damaged == ()

    run(main())


def test_a_flip_in_the_last_transaction_or_the_header_of_the_log_is_refused(tmp_path: Path) -> None:
    directory = filled(tmp_path / "j", five, crash=True)
    log = directory / "journal.sqlite-wal"
    for position in (3, 20, len(log.read_bytes()) - 3):
        copy = tmp_path / f"at-{position}"
        shutil.copytree(directory, copy)
        flip(copy / "journal.sqlite-wal", position)
        refused(copy, "has lost what it had promised")
        refused(copy, "has lost what it had promised")
    (directory / "journal.sqlite-wal").unlink()
    refused(directory, "has lost what it had promised")


def test_a_damaged_or_foreign_tail_is_refused(tmp_path: Path) -> None:
    directory = filled(tmp_path / "j", five)
    other = filled(tmp_path / "other", five)
    flip(directory / "tail", 20)
    refused(directory, "tail.*cannot be used")
    shutil.copy(other / "tail", directory / "tail")
    refused(directory, "not the journal that 'tail' belongs to")
    (directory / "tail").unlink()

    async def main() -> None:
        async with journal(directory) as opened:
            assert len((await opened.recover()).replay) == 5

    run(main())


def torn(raw: bytes) -> list[bytes]:
    """Logs that a power cut may leave while one more transaction is written."""
    rng = random.Random(1)
    frame = raw[-_FRAME:]
    return [
        raw + frame[: rng.randrange(_FRAME)],
        raw + frame,
        raw + bytes(3 * _FRAME),
        raw + rng.randbytes(2 * _FRAME),
        raw + frame[:24] + rng.randbytes(4096) + frame,
    ]


def test_what_a_power_cut_leaves_of_an_unfinished_transaction_is_ignored(tmp_path: Path) -> None:
    directory = filled(tmp_path / "j", five, crash=True)
    for index, raw in enumerate(torn((directory / "journal.sqlite-wal").read_bytes())):
        copy = tmp_path / f"torn-{index}"
        shutil.copytree(directory, copy)
        (copy / "journal.sqlite-wal").write_bytes(raw)

        async def main(copy: Path = copy) -> None:
            async with journal(copy) as opened:
                found, blobs = await everything(opened)
                assert (len(found.replay), len(found.pending), found.damaged) == (5, 1, ())
                assert b"damaged" not in blobs.values()

        run(main())


@pytest.mark.parametrize("crash", [False, True])
def test_no_flipped_byte_is_ever_applied(tmp_path: Path, crash: bool) -> None:
    """Wherever a byte flips: opening is refused, a record is named, or everything reads as it was."""
    directory = filled(tmp_path / "j", five, crash=crash)
    pristine = tmp_path / "pristine"
    shutil.copytree(directory, pristine)
    seen: list[tuple[Recovered, dict[tuple[str, int], bytes | None]]] = []

    async def look(where: Path) -> None:
        async with journal(where) as opened:
            seen.append(await everything(opened))

    run(look(pristine))
    whole, intact = seen[0]
    rng = random.Random(7)
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "journal.sqlite-shm"]
    outcomes: dict[str, int] = {}
    for _ in range(60):
        path = rng.choice(files)
        copy = tmp_path / "copy"
        shutil.copytree(directory, copy)
        target = copy / path.relative_to(directory)
        flip(target, rng.randrange(target.stat().st_size), rng.randrange(8))
        outcome = _outcome(look, copy, seen, whole, intact)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        shutil.rmtree(copy)
    assert outcomes.keys() <= {"refused", "named", "harmless"}
    assert outcomes["refused"] > 0


def _outcome(
    look: Callable[[Path], object],
    where: Path,
    seen: list[tuple[Recovered, dict[tuple[str, int], bytes | None]]],
    whole: Recovered,
    intact: dict[tuple[str, int], bytes | None],
) -> str:
    try:
        run(look(where))  # type: ignore[arg-type]
    except JournalError as error:
        return "refused" if re.search(r"journal\.sqlite|tail", str(error)) else "refused without a name"
    found, blobs = seen.pop()
    assert set(found.models) <= set(whole.models)
    assert set(found.replay) <= set(whole.replay)
    assert {row.number for row in found.pending} <= {row.number for row in whole.pending}
    lost = len(whole.models) + len(whole.replay) + len(whole.pending)
    lost -= len(found.models) + len(found.replay) + len(found.pending)
    assert lost == len(found.damaged)
    for key, blob in blobs.items():
        assert blob in (intact[key], b"damaged")
    return "named" if lost or b"damaged" in blobs.values() else "harmless"
