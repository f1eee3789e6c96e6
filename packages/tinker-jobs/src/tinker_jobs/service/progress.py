"""What a job has reported, put together: metrics, artifacts, and where the job is."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import attrs

from tinker_core.errors import InvalidRequestError
from tinker_jobs.protocol import EVAL_STEPS, STEPS, EventType, JobEvent
from tinker_jobs.records import JobRecord, JobStatus, LogRecord

_EVAL = "eval/"

_FINAL = {
    EventType.TRAINING_END: JobStatus.COMPLETED,
    EventType.TRAINING_ERROR: JobStatus.FAILED,
    EventType.CANCELLED: JobStatus.CANCELLED,
}


class Metrics:
    """The metrics of one job.

    A number takes the place of the one before it. A series has one place for each step of its axis, in order of the
    steps: what is reported again for a step replaces it, and a step for which nothing was reported holds None. A list
    without an axis beside it is appended to. What a name is may change with every report.
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._series: dict[str, set[str]] = {STEPS: set(), EVAL_STEPS: set()}
        """Names by axis."""

    def snapshot(self) -> dict[str, Any]:
        """All of it, as it is now."""
        return {name: list(value) if isinstance(value, list) else value for name, value in self._values.items()}

    def copy(self) -> Metrics:
        """The same, to be added to alone."""
        copied = Metrics()
        copied._values = self.snapshot()
        copied._series = {axis: set(names) for axis, names in self._series.items()}
        return copied

    def merge(self, reported: Mapping[str, Any], *, whole: bool = False) -> None:
        """Add what an event reports; lists without an axis take the place of what was there if they are ``whole``.

        Raises `InvalidRequestError` for a series that does not fit its axis.
        """
        by_axis, loose = _by_axis(reported)
        for name, value in reported.items():
            if not _is_list(value):
                self._detach(name)
                self._values[name] = value
        for name in loose:
            self._detach(name)
            self._values[name] = [*(() if whole else self._list(name)), *reported[name]]
        for axis, names in by_axis.items():
            self._merge_series(axis, reported[axis], {name: reported[name] for name in names})

    def _merge_series(self, axis: str, steps: Sequence[float], series: Mapping[str, Sequence[Any]]) -> None:
        known = self._values.setdefault(axis, [])
        for name in series.keys() - self._series[axis]:
            self._detach(name)
            self._values[name] = [None] * len(known)
            self._series[axis].add(name)
        for place, step in enumerate(steps):
            index = bisect.bisect_left(known, step)
            if index == len(known) or known[index] != step:
                known.insert(index, step)
                for name in self._series[axis]:
                    self._values[name].insert(index, None)
            for name, values in series.items():
                self._values[name][index] = values[place]

    def _detach(self, name: str) -> None:
        """Let a name be no series any more."""
        for names in self._series.values():
            names.discard(name)

    def _list(self, name: str) -> list[Any]:
        found = self._values.get(name)
        return found if isinstance(found, list) else []


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _by_axis(reported: Mapping[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """The names of an event's series by their axes, and of its lists that have none."""
    axes = [axis for axis in (STEPS, EVAL_STEPS) if axis in reported]
    for axis in axes:
        steps = reported[axis]
        if not _is_list(steps) or not all(isinstance(step, int | float) for step in steps):
            raise InvalidRequestError(f"metrics {axis!r} must be a list of numbers, got {steps!r:.60}")
    found: dict[str, list[str]] = {axis: [] for axis in axes}
    loose = []
    for name, value in reported.items():
        if name in axes or not _is_list(value):
            continue
        if not axes:
            loose.append(name)
            continue
        wanted = EVAL_STEPS if name.startswith(_EVAL) else STEPS
        axis = wanted if wanted in axes else axes[0]
        if len(value) != len(reported[axis]):
            raise InvalidRequestError(
                f"metrics {name!r} have {len(value)} values for {len(reported[axis])} {axis}; send one for each"
            )
        found[axis].append(name)
    return found, loose


def replay(reports: Iterable[LogRecord]) -> Metrics:
    """The metrics that follow from a job's log; what was done again or given up does not count."""
    counted: list[LogRecord] = []
    for report in reports:
        if report.event_type == "retried":
            counted.clear()
        elif report.event_type == "resumed":
            while counted and (report.resume_step is None or counted[-1].resume_step != report.resume_step):
                counted.pop()
        else:
            counted.append(report)
    metrics = Metrics()
    for report in counted:
        metrics.merge(report.metrics)
    return metrics


def apply_event(record: JobRecord, event: JobEvent, metrics: Metrics, now: datetime) -> JobRecord:
    """A job after an event, which goes into its metrics too; a job that has ended stays as it is.

    Returns the very same record when nothing but the metrics changed. Raises `InvalidRequestError` for metrics that fit
    no axis.
    """
    if record.status.is_final:
        return record
    changes: dict[str, Any] = {}
    metrics.merge(event.metrics, whole=event.event_type is EventType.TRAINING_END)
    if event.artifacts:
        changes["artifacts"] = {**record.artifacts, **event.artifacts}
    if event.resume is not None:
        changes["resume"] = event.resume
    if event.event_type is EventType.TRAINING_START and record.status is JobStatus.QUEUED:
        changes |= {"status": JobStatus.RUNNING, "started_at": now}
    if event.event_type in _FINAL:
        changes |= {"status": _FINAL[event.event_type], "completed_at": now, "metrics": metrics.snapshot()}
    if event.event_type is EventType.TRAINING_ERROR:
        changes["error"] = event.error or event.message
    return attrs.evolve(record, **changes) if changes else record


def reported_metrics(event: JobEvent) -> Mapping[str, Any]:
    """What the log keeps of an event's metrics: at a job's end the numbers, for the series are the job's."""
    if event.event_type is not EventType.TRAINING_END:
        return event.metrics
    return {name: value for name, value in event.metrics.items() if not _is_list(value)}
