"""Runs one job from its first process to its end: starts processes, listens to them, and replaces those that die."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.errors import AuthenticationError, InvalidRequestError, StorageError
from tinker_core.extensions import IssuedKey
from tinker_core.types import BaseModelSpec
from tinker_jobs.protocol import EventType, JobEvent, JobSpec, decode_event
from tinker_jobs.records import JobStatus
from tinker_jobs.service.active import STORAGE_RETRY_SECONDS, ActiveJob
from tinker_jobs.service.keys import NO_KEY, RunKeys
from tinker_jobs.service.processes import JobProcess, MalformedOutputError, hold_directory

log = logging.getLogger(__name__)

LOSSES_WITHOUT_PROGRESS = 3
"""Processes in a row that may die without a new saved state before the job fails."""
CANCEL_SECONDS = 300.0
"""How long a process may take to stop when it is asked to; steps of large jobs take minutes."""
EXIT_SECONDS = 30.0
"""How long a process may live on after it has reported its end."""
MAX_EVENT = 256 * 1024
"""Most bytes of an event other than the last, which has whole series."""


@attrs.frozen(kw_only=True)
class RunSettings:
    """What every process of a server is told, and what looks after it."""

    url: str
    base_models: tuple[BaseModelSpec, ...]
    plugins: tuple[str, ...]
    options: Mapping[str, Any]
    keys: RunKeys
    clock: Clock


class JobRunner:
    """Runs one job."""

    def __init__(self, job: ActiveJob, directory: Path, settings: RunSettings) -> None:
        self._job = job
        self._directory = directory
        self._settings = settings

    async def run(self, reason: str | None) -> None:
        """Return when the job has ended; cancelling this ends the process and leaves the job to a later run.

        ``reason`` says why a job goes on that ran before; None is one that begins.
        """
        job = self._job
        try:
            losses = 0
            while not job.record.status.is_final:
                before = job.record.resume
                try:
                    lost = await self._attempt(reason)
                except StorageError as error:
                    log.warning("job %s cannot be started now: %s", job.record.job_id, error)
                    clock = self._settings.clock
                    await clock.wait(job.ended, clock.monotonic() + STORAGE_RETRY_SECONDS)
                    continue
                if lost is None or job.record.status.is_final:
                    continue
                losses = losses + 1 if job.record.resume == before else 1
                reason = f"worker lost: {lost}"
                if job.record.cancel_requested_at is not None:
                    await job.finish(JobStatus.CANCELLED, f"cancelled; {reason}")
                elif losses >= LOSSES_WITHOUT_PROGRESS:
                    await job.finish(JobStatus.FAILED, f"failed: {reason}", reason)
        except AuthenticationError as error:
            await self._fail(f"the API key that the job was submitted with cannot be used: {error}")
        except Exception as error:
            log.exception("job %s cannot be run", job.record.job_id)
            await self._fail(f"the job cannot be run: {type(error).__name__}: {error}")

    async def _fail(self, error: str) -> None:
        await self._job.finish(JobStatus.FAILED, f"failed: {error}", error)

    async def _attempt(self, reason: str | None) -> str | None:
        """Run one process; how it ended when it did so without a word."""
        job, settings = self._job, self._settings
        model_path = next((one.path for one in settings.base_models if one.name == job.record.base_model), None)
        if model_path is None:
            served = ", ".join(one.name for one in settings.base_models)
            await self._fail(f"base model {job.record.base_model!r} is not served any more; this server has {served}")
            return None
        async with hold_directory(self._directory) as held, settings.keys.issued(job.record) as key:
            if not await job.begin(None if key is None else key.key_id, reason):
                return None
            try:
                return await self._run_process(self._spec(key, model_path), held, key)
            finally:
                await job.release()

    async def _run_process(self, spec: JobSpec, held: int, key: IssuedKey | None) -> str | None:
        try:
            process = await JobProcess.start(spec, held)
        except OSError as error:
            return f"no process can be started: {error}"
        return await self._attend(process, key)

    def _spec(self, key: IssuedKey | None, model_path: str) -> JobSpec:
        record = self._job.view()
        return JobSpec(
            job_id=record.job_id,
            attempt=record.attempt,
            request=record.request,
            refs=record.refs,
            base_model=record.base_model,
            model_path=model_path,
            base_url=self._settings.url,
            api_key=NO_KEY if key is None else key.key,
            directory=self._directory,
            plugins=self._settings.plugins,
            options=self._settings.options,
            resume=record.resume,
            metrics=record.metrics,
            artifacts=record.artifacts,
        )

    async def _attend(self, process: JobProcess, key: IssuedKey | None) -> str | None:
        """Listen to a process and look after it until it has ended."""
        watches: list[Callable[[], Coroutine[Any, Any, None]]] = [
            lambda: self._pass_cancellation(process),
            lambda: self._see_it_end(process),
        ]
        if key is not None:
            watches.append(lambda: self._keep_key(process, key))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(watch()) for watch in watches]
                await self._listen(process)
                await process.exited.wait()
                for task in tasks:
                    task.cancel()
        finally:
            await process.end()
        return None if self._job.record.status.is_final else process.describe_end()

    async def _listen(self, process: JobProcess) -> None:
        try:
            async for lines in process.batches():
                events, malformed = _read(lines)
                await self._job.report(events)
                if malformed is not None:
                    raise MalformedOutputError(malformed)
        except (MalformedOutputError, InvalidRequestError) as error:
            await self._fail(f"the job's process said what is no event: {error}")
            process.kill()

    # --- beside it ----------------------------------------------------------------------------------------------------

    async def _pass_cancellation(self, process: JobProcess) -> None:
        await self._job.cancel_requested.wait()
        await process.cancel()
        await self._kill_after(process, CANCEL_SECONDS, "it did not stop when it was asked to")

    async def _see_it_end(self, process: JobProcess) -> None:
        await self._job.ended.wait()
        await self._kill_after(process, EXIT_SECONDS, "it lived on after the job had ended")

    async def _keep_key(self, process: JobProcess, key: IssuedKey) -> None:
        refusal = await self._settings.keys.keep(self._job.record, key, process.exited)
        if refusal is not None:
            await self._fail(f"the API key that the job was submitted with cannot be used any more: {refusal}")
            process.kill()

    async def _kill_after(self, process: JobProcess, seconds: float, why: str) -> None:
        clock = self._settings.clock
        await clock.wait(process.exited, clock.monotonic() + seconds)
        if not process.exited.is_set():
            await self._job.note(f"the process was killed: {why}", "warning")
            process.kill()


def _read(lines: list[bytes]) -> tuple[list[JobEvent], str | None]:
    """Events up to the first line that is none, and what is wrong with that."""
    events: list[JobEvent] = []
    for line in lines:
        try:
            event = decode_event(line)
        except ValueError as error:
            return events, str(error)
        if len(line) > MAX_EVENT and event.event_type is not EventType.TRAINING_END:
            return events, f"{event.event_type} of {len(line)} bytes; at most {MAX_EVENT} are kept"
        events.append(event)
    return events, None
