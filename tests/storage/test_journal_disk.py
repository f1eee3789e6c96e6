"""Full and broken disks: requests are refused with the cause, results are written in the end, nothing is half there."""

from __future__ import annotations

import asyncio
import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.storage.journals import LARGE, SMALL, accepted, answer, journal, model, noise, request, run
from tinker_core.errors import JournalError, JournalFullError
from tinker_core.storage.journal import Journal
from tinker_core.storage.journal.side_files import SideFiles

MIB = 1024 * 1024
INNER = "inner"


def small_disk(tmp_path: Path, megabytes: int, scenario: str) -> None:
    """Run a scenario of this module, in a process of its own, on a file system of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small file system")
    mount = f'mount -t tmpfs -o size={megabytes}m none "$1" && exec "$2" -m {__name__} "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-ec", mount, "sh", str(tmp_path), sys.executable, scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "passed"


async def fill_up(opened: Journal, size: int) -> tuple[list[int], str]:
    numbers: list[int] = []
    while True:
        try:
            numbers.append(await accepted(opened, len(numbers), size=size))
        except JournalFullError as error:
            return numbers, str(error)


async def requests_fill_the_disk(directory: Path) -> None:
    """With large and with small bodies: results still find room, and a snapshot makes room for requests."""
    for size in (LARGE, 30_000):
        here = directory / str(size)
        async with journal(here, reserve_bytes=2 * MIB) as opened:
            numbers, cause = await fill_up(opened, size)
            assert "is full" in cause
            assert str(here) in cause
            assert await opened.accept(request(opened.next_number(), 0, size=10)) == b"head %d" % numbers[0]
            await asyncio.wait_for(opened.resolve([answer(number) for number in numbers]), 30)
            for number in numbers:
                assert await opened.body(number) == noise(number, size)
                assert await opened.result(number) == noise(-number, 100)
            await opened.put_models([model(len(numbers))])
            await room(opened)
            assert opened.stats().reserve_bytes > 0
        async with journal(here, reserve_bytes=2 * MIB) as opened:
            found = await opened.recover()
            assert (found.damaged, found.replay) == ((), ())
            assert [await opened.result(number) for number in numbers] == [noise(-number, 100) for number in numbers]
        shutil.rmtree(here)


async def room(opened: Journal) -> None:
    """Return when requests are taken again."""
    for _ in range(200):
        # Each append is an occasion to look for room.
        await opened.note_attempts([1])
        if opened.stats().full is None:
            break
    await accepted(opened, 100_000)


def fill_with(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


async def results_wait_for_room(directory: Path) -> None:
    """Without any room at all results wait in memory, until there is some."""
    async with journal(directory / "j", reserve_bytes=MIB) as opened:
        numbers = [await accepted(opened, place) for place in range(40)]
        ballast = directory / "ballast"
        fill_with(ballast)
        waiting = opened.resolve([answer(number, size=LARGE) for number in numbers])
        other = opened.put_models([model(0)])
        with pytest.raises(JournalFullError, match="No space"):
            await opened.accept(request(opened.next_number(), 1000, size=LARGE))
        with pytest.raises(JournalFullError, match="is full"):
            await opened.accept(request(opened.next_number(), 1000, size=SMALL))
        assert not waiting.done()
        assert opened.stats().waiting == 2
        assert opened.stats().waiting_seconds > 0
        assert await opened.body(numbers[0]) == noise(numbers[0], SMALL)
        ballast.unlink()
        await asyncio.wait_for(asyncio.gather(waiting, other), 30)
        assert await opened.result(numbers[-1]) == noise(-numbers[-1], LARGE)
        (directory / "ballast").unlink(missing_ok=True)
        await room(opened)


async def a_full_disk_ends_with_the_process(directory: Path) -> None:
    """Closing does not wait for room for ever."""
    async with journal(directory / "j", reserve_bytes=MIB) as opened:
        numbers, _ = await fill_up(opened, LARGE)
        waiting = opened.resolve([answer(number, size=LARGE) for number in numbers])
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.5)
    with pytest.raises(JournalFullError):
        await waiting
    async with journal(directory / "j", reserve_bytes=MIB) as opened:
        assert [row.number for row in (await opened.recover()).pending] == numbers
        assert await opened.body(numbers[-1]) == noise(numbers[-1], LARGE)


async def a_journal_opens_on_a_full_disk(directory: Path) -> None:
    """By giving its reserve away."""
    async with journal(directory / "j", reserve_bytes=MIB) as opened:
        number = await accepted(opened, 0)
    fill_with(directory / "ballast")
    async with journal(directory / "j", reserve_bytes=MIB) as opened:
        assert opened.stats().reserve_bytes == 0
        with pytest.raises(JournalFullError, match="is full"):
            await opened.accept(request(opened.next_number(), 1))
        await opened.resolve([answer(number)])
        assert await opened.result(number) == noise(-number, 100)
        (directory / "ballast").unlink()
        await room(opened)
        assert opened.stats().reserve_bytes > 0


async def a_broken_disk_stops_the_journal(directory: Path) -> None:
    """A limit on file sizes fails writes with EFBIG, which is no matter of room."""
    import resource

    async with journal(directory / "j") as opened:
        number = await accepted(opened, 0)
        failed = asyncio.ensure_future(opened.wait_failed())
        await asyncio.sleep(0)
        assert not failed.done()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(JournalError, match=r"journal\.sqlite"):
            await opened.resolve([answer(number)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert "cannot be written" in str(await failed)
        with pytest.raises(JournalError, match="cannot be written"):
            await opened.accept(request(opened.next_number(), 1))
        assert await opened.body(number) == noise(number, SMALL), "reading goes on"
    async with journal(directory / "j") as opened:
        assert [row.number for row in (await opened.recover()).pending] == [number]


def test_requests_are_refused_on_a_full_disk_and_results_are_not(tmp_path: Path) -> None:
    small_disk(tmp_path, 12, "requests_fill_the_disk")


def test_results_wait_in_memory_until_there_is_room(tmp_path: Path) -> None:
    small_disk(tmp_path, 12, "results_wait_for_room")


def test_closing_does_not_wait_for_room_for_ever(tmp_path: Path) -> None:
    small_disk(tmp_path, 12, "a_full_disk_ends_with_the_process")


def test_a_journal_opens_on_a_full_disk(tmp_path: Path) -> None:
    small_disk(tmp_path, 12, "a_journal_opens_on_a_full_disk")


def test_any_other_error_of_the_disk_stops_the_journal(tmp_path: Path) -> None:
    small_disk(tmp_path, 12, "a_broken_disk_stops_the_journal")


def test_a_body_that_cannot_be_written_stops_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SideFiles, file: object, data: bytes) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            number = await accepted(opened, 0)
            monkeypatch.setattr(SideFiles, "write", broken)
            with pytest.raises(JournalError, match="Input/output error"):
                await opened.accept(request(opened.next_number(), 1, size=LARGE))
            assert "Input/output error" in str(await opened.wait_failed())
            with pytest.raises(JournalError, match="Input/output error"):
                await opened.resolve([answer(number)])

    run(main())


def test_an_exhausted_quota_counts_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SideFiles.write

    def exhausted(self: SideFiles, file: object, data: bytes) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    async def main() -> None:
        async with journal(tmp_path / "j") as opened:
            number = await accepted(opened, 0)
            monkeypatch.setattr(SideFiles, "write", exhausted)
            with pytest.raises(JournalFullError, match="Disk quota exceeded"):
                await opened.accept(request(opened.next_number(), 1, size=LARGE))
            waiting = opened.resolve([answer(number, size=LARGE)])
            monkeypatch.setattr(SideFiles, "write", whole)
            await waiting
            assert await opened.result(number) == noise(-number, LARGE)

    run(main())


if __name__ == "__main__":
    run(globals()[sys.argv[1]](Path(sys.argv[2])))
    sys.stdout.write("passed\n")
