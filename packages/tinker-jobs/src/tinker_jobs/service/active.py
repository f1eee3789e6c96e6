"""A job that waits or runs at this server: the one place where its record changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.errors import InvalidRequestError, StorageError
from tinker_jobs.errors import JobStateError
from tinker_jobs.protocol import JobEvent
from tinker_jobs.records import JobRecord, JobStatus
from tinker_jobs.service.progress import Metrics, apply_event, replay, reported_metrics
from tinker_jobs.service.store import JobStore, NewLine

log = logging.getLogger(__name__)

STORAGE_RETRY_SECONDS = 2.0
"""Time between two attempts to start a job's process or to keep what it reported, while the database fails."""

_NUL = str.maketrans({"\0": "\N{REPLACEMENT CHARACTER}"})
"""No database keeps a NUL in a text."""


@attrs.frozen(kw_only=True)
class Keeping:
    """What jobs are kept with."""

    store: JobStore
    clock: Clock
    changed: Callable[[str], None]
    """Told the id of a job once something new about it can be read."""


class ActiveJob:
    """A job whose changes come one after another, and are kept before anybody sees them."""

    def __init__(self, record: JobRecord, keeping: Keeping, metrics: Metrics | None = None) -> None:
        self.record = record
        self.has_process = False
        self.cancel_requested = asyncio.Event()
        self.ended = asyncio.Event()
        """Set once the status is final."""
        self._metrics = Metrics() if metrics is None else metrics
        self._keeping = keeping
        self._changes = asyncio.Lock()
        self._never = asyncio.Event()

    def view(self) -> JobRecord:
        """The job with the metrics that it has reported so far."""
        record = self.record
        return record if record.status.is_final else attrs.evolve(record, metrics=self._metrics.snapshot())

    # --- what its process says ----------------------------------------------------------------------------------------

    async def report(self, events: Sequence[JobEvent], *, patient: bool = True) -> None:
        """Take events, up to the one that ends the job; those of a job that has ended are passed over.

        A patient caller waits while the database fails; others get its error. Raises `InvalidRequestError` for metrics
        that fit no axis.
        """
        async with self._changes:
            record, now = self.record, self._keeping.clock.now()
            # What cannot be kept is sent again, and must not be counted twice.
            metrics = self._metrics if patient else self._metrics.copy()
            lines: list[NewLine] = []
            refused: InvalidRequestError | None = None
            for event in events:
                if record.status.is_final:
                    break
                try:
                    record = apply_event(record, event, metrics, now)
                except InvalidRequestError as error:
                    refused = error
                    break
                lines.append(self._line_of(event))
            if lines:
                await self._commit(record, lines, patient=patient)
                self._metrics = metrics
            if refused is not None:
                raise refused

    # --- what its owner asks for --------------------------------------------------------------------------------------

    async def cancel(self) -> None:
        """End it if it has no process, else ask the process to stop; raises `JobStateError` if it has ended."""
        async with self._changes:
            record, now = self.record, self._keeping.clock.now()
            if record.status.is_final:
                raise JobStateError(
                    f"the job is {record.status} already; only queued and running jobs can be cancelled"
                )
            if record.cancel_requested_at is not None:
                return
            record = attrs.evolve(record, cancel_requested_at=now)
            if self.has_process:
                line = self._line("cancel_requested", "asked to stop; it does after the step that it is in")
                await self._commit(record, [line])
                self.cancel_requested.set()
            else:
                await self._finish(record, JobStatus.CANCELLED, "cancelled; no process was running it", None)

    # --- what the service does ----------------------------------------------------------------------------------------

    async def begin(self, run_key_id: str | None, reason: str | None) -> bool:
        """Note that a process is about to run it; False if it has ended meanwhile.

        With a reason it goes on from where it last saved, and its metrics with it.
        """
        async with self._changes:
            record, now = self.record, self._keeping.clock.now()
            if record.status.is_final:
                return False
            started_at = now if record.started_at is None else record.started_at
            record = attrs.evolve(
                record,
                status=JobStatus.RUNNING,
                started_at=started_at,
                attempt=record.attempt + 1,
                run_key_id=run_key_id,
            )
            await self._commit(record, [self._first_line(record, reason)], patient=True)
            if reason is not None:
                self._metrics = replay(await self._keeping.store.reports(record.job_id))
            self.has_process = True
            return True

    def _first_line(self, record: JobRecord, reason: str | None) -> NewLine:
        data: dict[str, Any] = {"attempt": record.attempt}
        if reason is None:
            return self._line("started", f"started, attempt {record.attempt}", data=data)
        step = None if record.resume is None else record.resume.step
        where = "from the beginning: nothing was saved yet" if step is None else f"after step {step}, which was saved"
        message = f"{reason}; going on {where}, attempt {record.attempt}"
        return self._line("resumed", message, "warning", data={**data, "step": step}, resume_step=step)

    async def release(self) -> None:
        """Note that its process is gone, and the process's key with it."""
        async with self._changes:
            self.has_process = False
            if self.record.run_key_id is not None:
                await self._commit(attrs.evolve(self.record, run_key_id=None), [], patient=True)

    async def finish(self, status: JobStatus, message: str, error: str | None = None) -> None:
        """End it, unless it has ended."""
        async with self._changes:
            if not self.record.status.is_final:
                await self._finish(self.record, status, message, error, patient=True)

    async def note(self, message: str, level: str = "info") -> None:
        """Write a line of the service's own to its log."""
        async with self._changes:
            await self._commit(self.record, [self._line("log", message, level)], patient=True)

    async def _finish(
        self, record: JobRecord, status: JobStatus, message: str, error: str | None, *, patient: bool = False
    ) -> None:
        level = "error" if status is JobStatus.FAILED else "info"
        changes: dict[str, Any] = {"status": status, "completed_at": self._keeping.clock.now(), "error": error}
        record = attrs.evolve(record, metrics=self._metrics.snapshot(), **changes)
        await self._commit(record, [self._line(str(status), message, level)], patient=patient)

    # --- keeping ------------------------------------------------------------------------------------------------------

    async def _commit(self, record: JobRecord, lines: Sequence[NewLine], *, patient: bool = False) -> None:
        record = attrs.evolve(record, error=None if record.error is None else record.error.translate(_NUL))
        while True:
            try:
                await self._keep(record, lines)
                break
            except StorageError as error:
                if not patient:
                    raise
                log.warning("what job %s reports cannot be kept now: %s", record.job_id, error)
                clock = self._keeping.clock
                await clock.wait(self._never, clock.monotonic() + STORAGE_RETRY_SECONDS)
        self.record = record
        if record.status.is_final:
            self.ended.set()
        self._keeping.changed(record.job_id)

    async def _keep(self, record: JobRecord, lines: Sequence[NewLine]) -> None:
        if record == self.record:
            await self._keeping.store.append(lines)
        else:
            await self._keeping.store.update(record, lines)

    def _line_of(self, event: JobEvent) -> NewLine:
        return self._line(
            event.event_type.value,
            event.message,
            event.level,
            data=event.data,
            metrics=reported_metrics(event),
            resume_step=None if event.resume is None else event.resume.step,
        )

    def _line(self, event_type: str, message: str, level: str = "info", **fields: Any) -> NewLine:  # noqa: ANN401
        return make_line(self.record, self._keeping.clock, event_type, message, level, **fields)


def make_line(
    record: JobRecord,
    clock: Clock,
    event_type: str,
    message: str,
    level: str = "info",
    *,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
) -> NewLine:
    """A line for a job's log, of now."""
    return NewLine(
        job_id=record.job_id,
        owner=record.owner,
        project_id=record.project_id,
        timestamp=clock.now(),
        event_type=event_type,
        level=level,
        message=message.translate(_NUL),
        data=data or {},
        metrics=metrics or {},
        resume_step=resume_step,
    )
