"""When to kill what: drawn from a seed, in moments of the client's own progress."""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs

TARGETS = ("server", "rank", "supervisor", "all", "trap-server", "trap-rank")
"""Traps wait for the next change of a file by that process, so that they hit snapshots, saves and the journal."""
WEIGHTS = (30, 22, 10, 14, 16, 8)


@attrs.frozen(kw_only=True)
class KillPoint:
    """One deliberate death."""

    moment: int
    """The number of the moment of the client's progress."""
    target: str
    """One of `TARGETS`."""
    delay: float = 0.0
    """Seconds after the moment; 0 is at once, before the client learns anything more."""
    withhold: bool = False
    """Whether the client loses its connection at that moment too: what it asked may be done, and it cannot know."""
    changes: int = 1
    """For a trap, at which change of a file from then on."""
    again: tuple[str, float] | None = None
    """What dies so many seconds later, while the first death is being recovered from."""

    def __str__(self) -> str:
        again = f", then {self.again[0]} after {self.again[1]:.2f} s" if self.again else ""
        trap = f" at change {self.changes}" if self.target.startswith("trap") else ""
        return f"moment {self.moment} + {self.delay:.2f} s: {self.target}{trap}{again}"


def draw(seed: int, kills: int, moments: int, targets: Sequence[str] = TARGETS) -> list[KillPoint]:
    """Kill points spread over a run with so many moments; a second kill during recovery counts as one of them."""
    rng = random.Random(seed)
    weights = [WEIGHTS[TARGETS.index(target)] for target in targets]
    points: list[KillPoint] = []
    left = kills
    while left > 0:
        again = None
        if left > 1 and rng.random() < 0.25:
            again = (rng.choice([name for name in targets if not name.startswith("trap")]), rng.uniform(0.2, 4.0))
        points.append(
            KillPoint(
                moment=rng.randint(1, moments),
                target=rng.choices(targets, weights)[0],
                delay=0.0 if rng.random() < 0.5 else rng.uniform(0.0, 0.4),
                withhold=rng.random() < 0.3,
                changes=rng.randint(1, 12),
                again=again,
            )
        )
        left -= 2 if again else 1
    return sorted(points, key=lambda point: point.moment)
