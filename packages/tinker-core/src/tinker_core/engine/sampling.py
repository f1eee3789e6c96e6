"""Sampling sessions and the samples in flight; they bypass the training queue."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import attrs

from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.clock import Clock
from tinker_core.engine.futures import PendingResult
from tinker_core.engine.operations import inflight_name
from tinker_core.engine.registry import Registry
from tinker_core.engine.revision import model_of_revision
from tinker_core.errors import (
    CancelledRequestError,
    InvalidRequestError,
    LostWeightsError,
    StorageError,
    TinkerError,
    UnknownCheckpointError,
    UnsupportedFeatureError,
    WorkerLostError,
)
from tinker_core.executors.rank_loop import describe_error
from tinker_core.interfaces import Sampler
from tinker_core.types import (
    ACTIVE,
    CheckpointRecord,
    CreateSamplingSessionInput,
    EngineOutput,
    PreparedSample,
    QueueState,
    QueueStatus,
    SampleInput,
    SampleOutput,
    SamplerRecord,
    SessionRecord,
    TinkerPath,
    session_of_run,
)

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 2.0
"""How long the answer to a poll may wait for the sampler, which answers between two pieces of work."""
_NO_SLOT = "waiting for a sampler slot"
_LOADING = QueueStatus(state=QueueState.PAUSED_CAPACITY, reason="waiting for these weights to be in the sampler")
_WAITING = QueueStatus(state=QueueState.PAUSED_CAPACITY, reason="waiting for another sample to end")

MAX_DEATHS = 3
"""How often the workers may die under one sample before it fails: it may be what kills them."""

LoadSample = Callable[[], Awaitable[SampleInput]]
"""Reads the body of a sample."""


@attrs.define(kw_only=True, eq=False)
class _Sample:
    """One sample in progress."""

    entry: PendingResult
    load: LoadSample
    record: SamplerRecord
    base: BaseModel
    task: asyncio.Task[None] = attrs.field(init=False)
    request: SampleInput | None = None
    """Its body, once it was read."""
    num_deaths: int = 0
    """How often the workers died while they had it."""


class Sampling:
    """Opens sampling sessions and runs samples on the sampler of their base model."""

    def __init__(
        self,
        registry: Registry,
        checkpoints: Checkpoints,
        clock: Clock,
        *,
        resolve: Callable[[str, EngineOutput], None],
        deterministic: bool = False,
    ) -> None:
        self._registry = registry
        self._checkpoints = checkpoints
        self._clock = clock
        self._resolve = resolve
        self._deterministic = deterministic
        self._one_by_one: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By base model."""
        self._running: dict[str, _Sample] = {}
        """By request id."""
        self.in_progress: Counter[str] = Counter()
        """Samples accepted and not finished, by base model."""

    async def open(
        self,
        request: CreateSamplingSessionInput,
        sampling_session_id: str,
        session: SessionRecord,
        base_of: Callable[[str], BaseModel],
    ) -> SamplerRecord:
        """Open a session on a base model or on saved weights."""
        if (request.base_model is None) == (request.model_path is None):
            raise InvalidRequestError("give either base_model or model_path")
        checkpoint: CheckpointRecord | None = None
        if request.model_path is not None:
            checkpoint = await self._checkpoints.get(request.model_path, session.owner, purpose="sample")
        base = base_of(checkpoint.base_model if checkpoint is not None else request.base_model or "")
        if not base.spec.sampleable:
            raise UnsupportedFeatureError(f"base model {base.spec.name!r} is served for training only")
        record = SamplerRecord(
            sampling_session_id=sampling_session_id,
            session_id=session.session_id,
            base_model=base.spec.name,
            created_at=self._clock.now(),
            model_path=request.model_path,
            revision=_revision_of(checkpoint) if checkpoint is not None else None,
            owner=session.owner,
            project_id=session.project_id,
        )
        await self._registry.put_sampler(record)
        return record

    def start(self, request: SampleInput, record: SamplerRecord, entry: PendingResult, base: BaseModel) -> None:
        """Run a sample behind the caller's back; its future gets the result."""

        async def present() -> SampleInput:
            return request

        self.resume(entry, present, record, base)

    def resume(self, entry: PendingResult, load: LoadSample, record: SamplerRecord, base: BaseModel) -> None:
        """Run a sample whose body is read when its turn comes. Its client counts as heard of now."""
        request_id = entry.accepted.request_id
        if entry.settled or request_id in self._running:
            return  # it was cancelled before it could begin
        self._registry.saw(record.session_id, self._clock.monotonic())
        sample = _Sample(entry=entry, load=load, record=record, base=base)
        sample.task = asyncio.create_task(self._run(sample))
        self._running[request_id] = sample
        self.in_progress[base.spec.name] += 1

        def end(_: asyncio.Task[None]) -> None:
            del self._running[request_id]
            self.in_progress[base.spec.name] -= 1

        sample.task.add_done_callback(end)

    def num_waiting(self, base_model: str) -> int:
        """Samples in progress that wait for workers, for weights, or for their turn."""
        samples = (sample for sample in self._running.values() if sample.base.spec.name == base_model)
        return sum(sample.entry.started_at is None for sample in samples)

    async def cancel(self, request_id: str) -> None:
        """End a sample, wherever it is, and fail its future; one that has its result keeps it."""
        await self._end(request_id, CancelledRequestError(request_id))

    async def drop_waiting(self, session_id: str, error: TinkerError) -> None:
        """End the samples of a session that have not begun; those that run go on."""
        samples = [sample for sample in self._running.values() if sample.record.session_id == session_id]
        waits = await asyncio.gather(*(_has_not_begun(sample) for sample in samples))
        waiting = [sample for sample, has_not_begun in zip(samples, waits, strict=True) if has_not_begun]
        await asyncio.gather(*(self._end(sample.entry.accepted.request_id, error) for sample in waiting))

    async def _end(self, request_id: str, error: TinkerError) -> None:
        sample = self._running.get(request_id)
        if sample is not None:
            sample.task.cancel()
            await asyncio.wait([sample.task])
        # A sample that ended in the same moment has its result already, and keeps it.
        self._resolve(request_id, describe_error(error))

    async def queue_status(self, request_id: str, base: BaseModel) -> QueueStatus:
        """Whether a sample that the engine has handed over has a place in its sampler."""
        if not base.has_sampler:
            return _restarting(base)
        asking = asyncio.create_task(base.sampler.is_waiting(request_id))
        try:
            await asyncio.wait([asking], timeout=_ANSWER_SECONDS)
            if not asking.done():
                return QueueStatus(state=QueueState.PAUSED_CAPACITY, reason="the sampler is busy with other work")
            waits = asking.result()
        except WorkerLostError:
            return _restarting(base)
        finally:
            asking.cancel()
        return QueueStatus(state=QueueState.PAUSED_CAPACITY, reason=_NO_SLOT) if waits else ACTIVE

    async def _run(self, sample: _Sample) -> None:
        output: EngineOutput
        request_id = sample.entry.accepted.request_id
        try:
            output = await self._sample(sample)
        except Exception as error:
            if not isinstance(error, TinkerError):
                log.exception("sample %s failed", request_id)
            output = describe_error(error)
        self._resolve(request_id, output)

    async def _sample(self, sample: _Sample) -> SampleOutput:
        """Run a sample, again whenever the workers die under it: its seed is fixed, so nobody can tell."""
        base = sample.base
        while True:
            sample.entry.status, sample.entry.started_at = ACTIVE, None
            sampler = await base.wait_sampler()
            try:
                return await self._attempt(sample, sampler)
            except WorkerLostError as error:
                if base.is_serving(sampler):
                    raise
                if sample.num_deaths >= MAX_DEATHS:
                    message = f"the workers died {sample.num_deaths} times under this sample, it is given up: {error}"
                    raise WorkerLostError(message) from error
                await base.revisions.wait_detached(sampler)

    async def _attempt(self, sample: _Sample, sampler: Sampler) -> SampleOutput:
        entry, base = sample.entry, sample.base
        name = self._revision(sample.record, base)
        entry.status = _LOADING
        async with base.revisions.use(name) as revision, self._turn(sample):
            request = sample.request = sample.request or await sample.load()
            if not base.is_serving(sampler):
                raise WorkerLostError("the sampler ended before this sample began")
            entry.status, entry.started_at = ACTIVE, self._clock.monotonic()
            prepared = PreparedSample(request_id=entry.accepted.request_id, revision=revision, request=request)
            try:
                return await sampler.sample(prepared)
            except WorkerLostError:
                sample.num_deaths += 1
                raise

    @asynccontextmanager
    async def _turn(self, sample: _Sample) -> AsyncIterator[None]:
        """One sample at a time in deterministic mode, and of those under which workers have died more than once.

        So the samples that only ran beside one that kills its worker do not share its fate.
        """
        if not self._deterministic and sample.num_deaths < MAX_DEATHS - 1:
            yield
            return
        sample.entry.status = _WAITING
        async with self._one_by_one[sample.base.spec.name]:
            yield

    def _revision(self, record: SamplerRecord, base: BaseModel) -> str | None:
        """The revision that a session serves now."""
        if record.revision is None:
            return None
        if record.model_path is not None:
            base.revisions.add_saved(
                record.revision, _SavedWeights(self._checkpoints, record.model_path, record.revision)
            )
            return record.revision
        revision = self._ephemeral_revision(record.revision)
        if revision is None or not base.revisions.knows(revision):
            raise LostWeightsError(record.sampling_session_id, "their process has ended")
        return revision

    def _ephemeral_revision(self, name: str) -> str | None:
        """The revision that an ephemeral session's name stands for: itself, or a model's inflight target."""
        model_id, _, _ = name.rpartition("@")
        return self._registry.inflight.get(model_id) if name == inflight_name(model_id) else name

    async def release(self, session_id: str, bases: Mapping[str, BaseModel]) -> None:
        """Drop the ephemeral weights of a finished session, once nobody samples from them."""
        self._registry.forget_samplers_of(session_id)
        for base in bases.values():
            for name in base.revisions.ephemeral():
                if session_of_run(model_of_revision(name)) == session_id:
                    try:
                        await base.revisions.drop(name)
                    except StorageError as error:
                        log.error("weights %s of a finished session are left on disk: %s", name, error)
        self._registry.forget_inflight_of(session_id)

    async def release_finished(self, bases: Mapping[str, BaseModel]) -> None:
        """Drop the weights on disk of sessions that an earlier process finished, or that no longer exist."""
        names = [name for base in bases.values() for name in base.revisions.ephemeral()]
        for session_id in {session_of_run(model_of_revision(name)) for name in names}:
            session = await self._registry.control.get_session(session_id) if session_id is not None else None
            if session_id is not None and (session is None or session.finished_at is not None):
                await self.release(session_id, bases)

    async def close(self) -> None:
        """Let go of the samples in flight without a result: the journal has them, and they run after the next start."""
        tasks = [sample.task for sample in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@attrs.frozen
class _SavedWeights:
    """The files of a checkpoint, for the sampling sessions that opened it: who may read it is not asked again."""

    checkpoints: Checkpoints
    path: str
    revision: str

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Path]:
        """Its directory; raises `UnknownCheckpointError` when it was deleted."""
        checkpoint = await self._find()
        if checkpoint is None:
            raise UnknownCheckpointError(self.path)
        async with self.checkpoints.reading(checkpoint) as directory:
            yield directory

    async def is_there(self) -> bool:
        """Whether it was not deleted."""
        return await self._find() is not None

    async def _find(self) -> CheckpointRecord | None:
        checkpoint = await self.checkpoints.find(TinkerPath.parse(self.path))
        return None if checkpoint is None or _revision_of(checkpoint) != self.revision else checkpoint


async def _has_not_begun(sample: _Sample) -> bool:
    """Whether a sample still waits: for workers, weights, or a slot of the sampler."""
    if sample.entry.started_at is None:
        return True
    try:
        return await sample.base.sampler.is_waiting(sample.entry.accepted.request_id)
    except WorkerLostError:
        return True


def _restarting(base: BaseModel) -> QueueStatus:
    return QueueStatus(state=QueueState.PAUSED_CAPACITY, reason=f"base model {base.spec.name!r} is restarting")


def _revision_of(checkpoint: CheckpointRecord) -> str:
    """A name for exactly these files: a path that is deleted and saved again is another revision."""
    return f"{checkpoint.path}@{checkpoint.request_id}"
