"""A training script with the unmodified SDK notices nothing of deaths at seeded points. nox -s chaos is longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.chaos.checks import Likeness, problems
from tests.chaos.plan import KillPoint, draw
from tests.chaos.run import Outcome, Setup, fake_setup, real_setup, run_loop
from tests.models import write_tiny_model

SEED = 4
EXACT = ("--deterministic", "--snapshot-steps", "2", "--snapshot-seconds", "1")
KILLS = 6


@attrs.frozen
class Case:
    """A loop, and how many moments it has, so that its disturbed run need not wait for the other."""

    loop: str
    steps: int
    moments: int

    def __str__(self) -> str:
        return self.loop


SUPERVISED, REINFORCED = Case("supervised", 9, 170), Case("reinforced", 5, 210)
SHORT_SUPERVISED, SHORT_REINFORCED = Case("supervised", 4, 75), Case("reinforced", 3, 130)


class Undisturbed:
    """Runs without deaths, each once, beside the disturbed ones."""

    def __init__(self, pool: ThreadPoolExecutor, directory: Callable[[], Path]) -> None:
        self._pool = pool
        self._directory = directory
        self._runs: dict[tuple[Case, Setup], Future[Outcome]] = {}

    def start(self, case: Case, setup: Setup) -> Future[Outcome]:
        """The outcome, now or later."""
        if (case, setup) not in self._runs:
            self._runs[case, setup] = self._pool.submit(run_loop, case.loop, setup, case.steps, self._directory())
        return self._runs[case, setup]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    with ThreadPoolExecutor(1) as pool:
        yield Undisturbed(pool, lambda: tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def compare(
    case: Case,
    setup: Setup,
    undisturbed: Undisturbed,
    directory: Path,
    points: Sequence[KillPoint],
    **options: Any,
) -> Outcome:
    """A disturbed run that is like an undisturbed one."""
    beside = undisturbed.start(case, setup)
    outcome = run_loop(case.loop, setup, case.steps, directory, points, **options)
    calm = beside.result()
    assert calm.code == 0, calm.complaints
    found = problems(calm, outcome, Likeness.BITS)
    assert not found, "\n".join([*found, "the deaths:", *outcome.deaths, f"the log: {outcome.log}"])
    return outcome


@pytest.mark.parametrize(("case", "seed"), [(SUPERVISED, SEED), (REINFORCED, SEED + 1)], ids=str)
def test_deaths_of_any_process_change_nothing(case: Case, seed: int, undisturbed: Undisturbed, tmp_path: Path) -> None:
    points = draw(seed, KILLS, case.moments)
    outcome = compare(case, fake_setup(*EXACT), undisturbed, tmp_path / "run", points)
    assert len(outcome.deaths) >= KILLS


@pytest.mark.parametrize(("case", "target"), [(SHORT_SUPERVISED, "all"), (SHORT_REINFORCED, "rank")], ids=str)
def test_deaths_of_real_workers_change_no_bit(
    case: Case, target: str, model: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    points = [KillPoint(moment=case.moments // 2, target=target, withhold=target == "all")]
    compare(case, real_setup(model, *EXACT), undisturbed, tmp_path / "run", points, last_death=False)


def test_torn_records_behind_the_last_acknowledged_one_are_left_out(undisturbed: Undisturbed, tmp_path: Path) -> None:
    journal = tmp_path / "run" / "data" / "journal"
    torn: list[Path] = []

    def tear() -> None:
        """What a power cut may leave of a commit that nobody was told of: half a frame, half a file."""
        for log in journal.rglob("*-wal"):
            with log.open("ab") as file:
                file.write(b"\x00\x00\x00\x07" + bytes(range(256)) * 9)
            torn.append(log)
        for directory in {journal, *(path.parent for path in journal.rglob("*.body"))}:
            if directory != journal:
                (directory / f"{2**40 + len(torn):016x}.body").write_bytes(b"half a rec")

    points = [KillPoint(moment=SUPERVISED.moments * share // 10, target="all", withhold=True) for share in (3, 6, 9)]
    compare(SUPERVISED, fake_setup(*EXACT), undisturbed, tmp_path / "run", points, between_lives=tear)
    assert len(torn) >= len(points)
