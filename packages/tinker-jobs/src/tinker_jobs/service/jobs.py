"""Training jobs: submitted, queued, run, watched, cancelled and run again."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import attrs

from tinker_core.errors import ConfigurationError
from tinker_core.extensions import RunningServer, ServiceContext
from tinker_core.types import Caller
from tinker_jobs.errors import JobStateError
from tinker_jobs.protocol import JobEvent
from tinker_jobs.records import JobRecord, JobStatus, LogRecord
from tinker_jobs.refs import FrozenRefs
from tinker_jobs.requests import CreateJobRequest, as_sent
from tinker_jobs.service.active import ActiveJob, Keeping, make_line
from tinker_jobs.service.keys import RunKeys
from tinker_jobs.service.progress import replay
from tinker_jobs.service.queueing import JobQueue
from tinker_jobs.service.runner import JobRunner, RunSettings
from tinker_jobs.service.store import LINES_AT_ONCE, JobStore

log = logging.getLogger(__name__)

_RESTARTED = "the server ended while the job ran"


class Jobs:
    """All training jobs that an owner may see, and the processes of those that run here.

    A job of another server that shares the control database can be looked at here, but not changed.
    """

    def __init__(self, store: JobStore, server: RunningServer, context: ServiceContext, *, url: str) -> None:
        self._store = store
        self._server = server
        self._root = context.data_dir.absolute() / "jobs"
        self._max_running = _max_running(context)
        self._keys = RunKeys(server)
        self._settings = RunSettings(
            url=url,
            base_models=server.base_models,
            plugins=tuple(plugin.name for plugin in context.plugins.installed()),
            options=context.options,
            keys=self._keys,
            clock=server.clock,
        )
        self._keeping = Keeping(store=store, clock=server.clock, changed=self._changed)
        self._active: dict[str, ActiveJob] = {}
        self._queue: JobQueue[ActiveJob] = JobQueue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news: dict[str, asyncio.Event] = {}
        """Set, and forgotten, when something new about a job can be read."""
        self._retrying = asyncio.Lock()
        self._opening: asyncio.Task[None] | None = None
        self._may_start = False
        self._closing = False

    def directory(self, job_id: str) -> Path:
        """The job's own files."""
        return self._root / job_id

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what an earlier server process left, and begin to run jobs once all base models are ready."""
        for record in await self._store.unfinished(self._server.server_id):
            if record.run_key_id is not None:
                await self._keys.revoke(record.run_key_id)
                record = attrs.evolve(record, run_key_id=None)
                await self._store.update(record)
            if not record.status.is_final:
                await self._take_up(record)
        self._opening = asyncio.create_task(self._open())

    async def _take_up(self, record: JobRecord) -> None:
        if record.status is JobStatus.QUEUED:
            self._queue.put(self._activate(ActiveJob(record, self._keeping)))
            return
        metrics = replay(await self._store.reports(record.job_id))
        job = self._activate(ActiveJob(record, self._keeping, metrics))
        if record.cancel_requested_at is not None:
            await job.finish(JobStatus.CANCELLED, f"cancelled; {_RESTARTED}")
        else:
            self._queue.put_interrupted(job)

    async def _open(self) -> None:
        await self._server.wait_ready()
        self._may_start = True
        self._fill()

    async def close(self) -> None:
        """End all processes; their jobs go on after the next start, and what follows them ends."""
        self._closing = True
        tasks = [*self._tasks.values(), *([] if self._opening is None else [self._opening])]
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.error("training jobs did not end in order: %s", outcome)
        for job_id in list(self._news):
            self._changed(job_id)

    # --- what owners do -----------------------------------------------------------------------------------------------

    async def submit(self, request: CreateJobRequest, refs: FrozenRefs, base_model: str, caller: Caller) -> JobRecord:
        """Queue a new job; it starts at once if there is a place."""
        record = JobRecord(
            job_id=str(uuid.uuid4()),
            owner=caller.owner,
            key_id=caller.key_id,
            server_id=self._server.server_id,
            status=JobStatus.QUEUED,
            request=as_sent(request),
            refs=refs,
            base_model=base_model,
            created_at=self._server.clock.now(),
        )
        await self._store.add(record, [make_line(record, self._server.clock, "queued", "queued")])
        self._queue.put(self._activate(ActiveJob(record, self._keeping)))
        self._fill()
        return record

    async def get(self, job_id: str, owner: str) -> JobRecord:
        """A job, with what it has reported so far; raises `UnknownJobError`."""
        job = self._active.get(job_id)
        if job is not None and job.record.owner == owner:
            return job.view()
        return await self._with_metrics(await self._store.get(job_id, owner))

    async def _with_metrics(self, record: JobRecord) -> JobRecord:
        """Those of a job that has not ended are in nobody's row."""
        if record.status is not JobStatus.RUNNING:
            return record
        job = self._active.get(record.job_id)
        metrics = job.view().metrics if job is not None else replay(await self._store.reports(record.job_id)).snapshot()
        return attrs.evolve(record, metrics=metrics)

    async def logs(self, job_id: str, owner: str, after: int = 0) -> list[LogRecord]:
        """Lines of a job's log behind a number, oldest first; raises `UnknownJobError`."""
        await self.get(job_id, owner)
        return await self._store.logs(job_id, after)

    async def follow(self, job_id: str, owner: str, after: int = 0) -> AsyncIterator[LogRecord | JobRecord]:
        """Lines behind a number as they are written, and the job whenever its status has changed; its end is the last.

        Ends without the job when the server stops. Raises `UnknownJobError`, and `JobStateError` for a job that runs at
        another server.
        """
        record = await self.get(job_id, owner)
        self._require_here(record, "follow it")
        while True:
            status = record.status
            news = self._news.setdefault(job_id, asyncio.Event())
            record = await self.get(job_id, owner)
            lines = await self._store.logs(job_id, after, LINES_AT_ONCE)
            for line in lines:
                yield line
                after = line.number
            if len(lines) == LINES_AT_ONCE:
                continue
            if record.status.is_final or self._closing:
                if self._news.get(job_id) is news:  # else somebody waits there for what came after
                    del self._news[job_id]
                if record.status.is_final:
                    yield record
                return
            if record.status is not status:
                yield record
            await news.wait()

    async def cancel(self, job_id: str, owner: str) -> JobRecord:
        """End a job that has no process at once, and ask a process to stop; a second time changes nothing.

        Raises `UnknownJobError`, and `JobStateError` for a job that has ended.
        """
        record = await self.get(job_id, owner)
        self._require_here(record, "cancel it")
        job = await self._job_of(record)
        await job.cancel()
        return job.view()

    async def retry(self, job_id: str, owner: str) -> JobRecord:
        """Queue a job that failed or was cancelled again, to run from the beginning; its log goes on.

        Raises `UnknownJobError`, and `JobStateError` for a job in another state.
        """
        async with self._retrying:
            record = await self.get(job_id, owner)
            if record.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
                raise JobStateError(f"the job is {record.status}; only failed and cancelled jobs can be retried")
            if record.server_id != self._server.server_id:
                raise _elsewhere(record, "retry it")
            await self._end_process(job_id)
            record = _as_new(await self._store.get(job_id, owner))
            line = make_line(record, self._server.clock, "retried", f"retry #{record.num_retries}")
            await self._store.update(record, [line])
            self._queue.put(self._activate(ActiveJob(record, self._keeping)))
        self._changed(job_id)
        self._fill()
        return record

    async def apply_progress(self, job_id: str, owner: str, event: JobEvent) -> JobRecord:
        """Take an event of a worker that reports over HTTP; one for a job that has ended changes nothing.

        Raises `UnknownJobError`, `InvalidRequestError` for metrics that fit no axis, and `JobStateError` for a job that
        runs at another server.
        """
        record = await self.get(job_id, owner)
        if record.status.is_final:
            return record
        self._require_here(record, "report its progress")
        job = await self._job_of(record)
        await job.report([event], patient=False)
        return job.view()

    # --- running ------------------------------------------------------------------------------------------------------

    async def _job_of(self, record: JobRecord) -> ActiveJob:
        """Where a job of this server changes."""
        job = self._active.get(record.job_id)
        if job is None and not record.status.is_final:
            async with self._retrying:  # its row is queued again, and it is about to be active
                job = self._active.get(record.job_id)
        return job or ActiveJob(record, self._keeping)

    def _activate(self, job: ActiveJob) -> ActiveJob:
        self._active[job.record.job_id] = job
        return job

    def _fill(self) -> None:
        """Start jobs while there are places."""
        while self._may_start and not self._closing and len(self._tasks) < self._max_running:
            job = self._queue.pop()
            if job is None:
                return
            self._tasks[job.record.job_id] = asyncio.create_task(self._run(job))

    async def _run(self, job: ActiveJob) -> None:
        job_id = job.record.job_id
        reason = None if job.record.status is JobStatus.QUEUED else _RESTARTED
        try:
            await JobRunner(job, self.directory(job_id), self._settings).run(reason)
        finally:
            del self._tasks[job_id]
            self._queue.done(job.record.owner)
            self._changed(job_id)
            self._fill()

    async def _end_process(self, job_id: str) -> None:
        """Return when nothing of a job that has ended runs any more."""
        task = self._tasks.get(job_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def _changed(self, job_id: str) -> None:
        job = self._active.get(job_id)
        if job is not None and job.record.status.is_final and job_id not in self._tasks:
            del self._active[job_id]
        news = self._news.pop(job_id, None)
        if news is not None:
            news.set()

    def _require_here(self, record: JobRecord, wish: str) -> None:
        if record.server_id != self._server.server_id and not record.status.is_final:
            raise _elsewhere(record, wish)

    async def list(
        self,
        owner: str,
        *,
        page: int = 1,
        page_size: int = 20,
        status: str | None = None,
        backend: str | None = None,
        trainer_type: str | None = None,
        project_ref: str | None = None,
    ) -> tuple[list[JobRecord], int]:
        """A page of an owner's jobs, newest first, and how many there are on all pages; pages begin at 1."""
        found, total = await self._store.list(
            owner,
            page=page,
            page_size=page_size,
            status=status,
            backend=backend,
            trainer_type=trainer_type,
            project_ref=project_ref,
        )
        return [await self._with_metrics(record) for record in found], total


def _elsewhere(record: JobRecord, wish: str) -> JobStateError:
    return JobStateError(f"the job belongs to another server ({record.server_id}); {wish} there")


def _as_new(record: JobRecord) -> JobRecord:
    return attrs.evolve(
        record,
        status=JobStatus.QUEUED,
        num_retries=record.num_retries + 1,
        started_at=None,
        completed_at=None,
        cancel_requested_at=None,
        error=None,
        metrics={},
        artifacts={},
        resume=None,
    )


def _max_running(context: ServiceContext) -> int:
    value = context.options["jobs-max-running"]
    if not isinstance(value, int) or value < 0:
        raise ConfigurationError(f"--jobs-max-running must be at least 0, got {value}")
    return value
