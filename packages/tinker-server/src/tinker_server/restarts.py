"""When the supervisor starts the next server process, and when it gives up. Pure; loads nothing, like all it uses."""

from __future__ import annotations

MAX_FAILED_STARTS = 5
"""Processes in a row that end before they accept requests, after which it makes no sense to go on."""
MAX_DELAY = 30.0
_FIRST_DELAY = 0.5


class Life:
    """What became of one server process."""

    def __init__(self, *, status: int, accepted: bool, was_ready: bool) -> None:
        self.status = status
        """Its exit status, or minus the signal that killed it."""
        self.accepted = accepted
        """Whether it ever accepted requests."""
        self.was_ready = was_ready
        """Whether its models ever were ready."""

    @property
    def failed_to_start(self) -> bool:
        """Of one that was never ready: whether it accepted no request either, or said itself that it cannot go on."""
        return not self.accepted or self.status > 0

    def describe(self) -> str:
        """How it ended, for the log."""
        if self.status >= 0:
            return f"ended with status {self.status}"
        return f"was killed by signal {-self.status}"


class RestartPolicy:
    """Counts failures: a process that was ready makes up for all before it."""

    def __init__(self) -> None:
        self._ever_ready = False
        self._failed_starts = 0
        self._lives_without_work = 0

    def delay(self, life: Life) -> float | None:
        """Seconds until the next start; None to give up."""
        if life.was_ready:
            self._ever_ready = True
            self._failed_starts = self._lives_without_work = 0
            return 0.0
        if not self._ever_ready and life.status >= 0:
            return None  # settings that cannot work, or a model that cannot: no restart would help
        self._failed_starts = self._failed_starts + 1 if life.failed_to_start else 0
        if self._failed_starts >= MAX_FAILED_STARTS:
            return None
        self._lives_without_work += 1
        if self._lives_without_work == 1:
            return 0.0
        return min(MAX_DELAY, _FIRST_DELAY * 2.0 ** (self._lives_without_work - 2))
