"""Which job starts next: first come, first served within an owner, and fair between owners."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from typing import Generic, Protocol, TypeVar

from tinker_jobs.records import JobRecord, JobStatus


class Queued(Protocol):
    """A job that waits."""

    @property
    def record(self) -> JobRecord:
        """The job as it is now."""


_J = TypeVar("_J", bound=Queued)


class JobQueue(Generic[_J]):
    """Jobs that wait for a place.

    Next is the owner with the fewest running jobs; of several, the one that has waited longest for a turn. So with one
    place owners take turns, however many jobs one of them has submitted.
    """

    def __init__(self) -> None:
        self._interrupted: deque[_J] = deque()
        self._lines: dict[str, deque[_J]] = {}
        self._running: Counter[str] = Counter()
        self._turns: dict[str, int] = {}
        """When each owner had its last turn."""
        self._clock = itertools.count(1)

    def put(self, job: _J) -> None:
        """Add a job behind its owner's others."""
        self._lines.setdefault(job.record.owner, deque()).append(job)

    def put_interrupted(self, job: _J) -> None:
        """Add a job that had a place already: it goes before all that never had one."""
        self._interrupted.append(job)

    def pop(self) -> _J | None:
        """The job to start now, which runs from here on; None when none waits. What need not start is passed over."""
        while self._interrupted:
            job = self._interrupted.popleft()
            if not job.record.status.is_final:
                return self._started(job)
        while self._lines:
            job = self._next()
            if job.record.status is JobStatus.QUEUED:
                return self._started(job)
        return None

    def done(self, owner: str) -> None:
        """A job of an owner has given its place back."""
        self._running[owner] -= 1

    def _started(self, job: _J) -> _J:
        owner = job.record.owner
        self._running[owner] += 1
        self._turns[owner] = next(self._clock)
        return job

    def _next(self) -> _J:
        # Dictionaries keep the order in which owners came, which decides between those that never had a turn.
        owner = min(self._lines, key=lambda name: (self._running[name], self._turns.get(name, 0)))
        line = self._lines[owner]
        job = line.popleft()
        if not line:
            del self._lines[owner]
        return job
