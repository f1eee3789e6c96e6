"""Carries a plan out: kills what it names at the moments that it names."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import attrs

from tests.chaos.command import Command
from tests.chaos.plan import KillPoint

PATIENCE = 120.0
"""Seconds to wait for a process that is to be killed and is not there yet."""


@attrs.define
class Killer:
    """``on_moment`` belongs to the `tests.chaos.proxy.Proxy` of the command."""

    command: Command
    points: list[KillPoint]
    traps: Path
    """The directory that `tests.chaos.traps` looks into."""
    deaths: list[str] = attrs.field(factory=list)
    """What was killed, in words."""
    missed: list[str] = attrs.field(factory=list)
    """What was not there to be killed."""
    _threads: list[threading.Thread] = attrs.field(factory=list)
    _started: float = attrs.field(factory=time.monotonic)
    _closed: threading.Event = attrs.field(factory=threading.Event)

    def on_moment(self, number: int, phase: str) -> bool:
        """Kill what is due; whether the client is to lose its connection as well."""
        del phase
        broken = False
        while self.points and self.points[0].moment <= number:
            point = self.points.pop(0)
            broken |= point.withhold
            if point.delay == 0.0:
                self._strike(point)
            else:
                self._later(point.delay, lambda point=point: self._strike(point))
        return broken

    def close(self) -> None:
        """No more deaths; points that the run never reached were missed."""
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self.missed += map(str, self.points)
        for kind in ("server", "rank"):
            if (self.traps / kind).exists():  # nothing changed any more
                (self.traps / kind).unlink()
                self.deaths.remove(next(death for death in reversed(self.deaths) if f"trap-{kind}" in death))

    def _strike(self, point: KillPoint) -> None:
        kind = point.target.removeprefix("trap-")
        if kind != point.target and not (self.traps / kind).exists():
            (self.traps / f".{kind}").write_text(f"{point.changes} {point.moment}")
            (self.traps / f".{kind}").rename(self.traps / kind)
            self._note(str(point))
        elif self.command.kill(kind):
            self._note(str(point))
        else:
            self._later(0.05, lambda: self._persist(kind, str(point)))
        if point.again is not None:
            target, delay = point.again
            self._later(delay, lambda: self._persist(target, f"again {target}"))

    def _persist(self, target: str, name: str) -> None:
        """Kill as soon as there is something to kill."""
        deadline = time.monotonic() + PATIENCE
        while not self.command.kill(target):
            if time.monotonic() > deadline:
                self.missed.append(name)
                return
            if self._closed.wait(0.05):
                return
        self._note(name)

    def _later(self, delay: float, action: object) -> None:
        def run() -> None:
            if not self._closed.wait(delay):
                action()  # type: ignore[operator]

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _note(self, name: str) -> None:
        self.deaths.append(f"{time.monotonic() - self._started:7.2f} s  {name}")
