"""SIGKILL at any instruction: what was acknowledged is there, nothing is half there, nothing raises a false alarm."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import attrs
import pytest

from tests.storage.journal_victim import fate_of, size_of
from tests.storage.journals import answer, journal, noise, request, run
from tinker_core.storage.journal import Fate, Journal


@attrs.define
class Told:
    """What the killed process had said."""

    places: dict[int, int] = attrs.field(factory=dict)
    resolved: set[int] = attrs.field(factory=set)
    acknowledged: int = 0
    covering: int = 0
    covered: int = 0

    def hear(self, line: str) -> None:
        word, *values = line.split()
        numbers = [int(value) for value in values]
        if word == "accepted":
            self.places[numbers[0]] = numbers[1]
            self.acknowledged += 1
        elif word == "resolved":
            self.resolved.add(numbers[0])
        elif word == "covering":
            self.covering = max(self.covering, numbers[0])
        elif word == "covered":
            self.covered = max(self.covered, numbers[0])


def kill_again_and_again(directory: Path, times: int, seed: int) -> int:
    """Kill, verify, go on with the same journal; returns how many requests had been acknowledged in all."""
    rng = random.Random(seed)
    told = Told()
    command = [sys.executable, "-m", "tests.storage.journal_victim", str(directory)]
    victim = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert victim.stdin is not None
    assert victim.stdout is not None
    with victim:
        for _ in range(times):
            victim.stdin.write(f"{rng.randrange(2**31)}\n")
            victim.stdin.flush()
            pid = int(victim.stdout.readline().split()[1])
            killer = threading.Timer(rng.expovariate(1 / 0.2), os.kill, (pid, signal.SIGKILL))
            killer.start()
            while (line := victim.stdout.readline().strip()) != "dead":
                told.hear(line)
            killer.join()
            run(verify(directory, told))
        victim.stdin.close()
    return told.acknowledged


async def verify(directory: Path, told: Told) -> None:
    async with journal(directory) as opened:
        found = await opened.recover()
        assert found.damaged == ()
        pending = {row.number for row in found.pending}
        replay = {row.number: row for row in found.replay}
        snapshot = max((row.next_seq_id for row in found.models), default=0)
        assert told.covered <= snapshot <= told.covering
        for number, place in told.places.items():
            assert await opened.head(number) == b"head %d" % number
            if number in told.resolved:
                assert number not in pending
            if place >= snapshot:
                assert number in pending or replay[number].fate is fate_of(number)
        for number in (*pending, *replay):
            body = await opened.body(number)
            kept = number in pending or fate_of(number) is Fate.KEEP
            assert body == (noise(number, size_of(number)) if kept else None)
        for number in {*told.places, *replay} - pending:
            assert await opened.result(number) == noise(-number, size_of(number))
        await _repeat(opened, told)
        # Only what may still change is looked at again.
        told.places = {number: place for number, place in told.places.items() if place >= snapshot - 20}
        await _finish(opened, pending)
        await _tidy(directory, opened)


async def _repeat(opened: Journal, told: Told) -> None:
    for number in list(told.places)[-3:]:
        again = request(opened.next_number(), told.places[number], size=10)
        assert await opened.accept(again) == b"head %d" % number


async def _finish(opened: Journal, pending: set[int]) -> None:
    await opened.resolve([answer(number, fate_of(number), size=size_of(number)) for number in pending])


async def _tidy(directory: Path, opened: Journal) -> None:
    stats = opened.stats()
    sizes = sum(path.stat().st_size for path in (directory / "files").iterdir())
    assert sizes == stats.file_bytes, "no file without a record, no record without its file"
    assert stats.pending == 0


def test_a_killed_journal_has_everything_that_it_acknowledged(tmp_path: Path) -> None:
    assert kill_again_and_again(tmp_path / "j", 20, seed=1) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(5))
def test_a_journal_killed_sixty_times_has_everything_that_it_acknowledged(tmp_path: Path, seed: int) -> None:
    assert kill_again_and_again(tmp_path / "j", 60, seed=seed) > 1000
