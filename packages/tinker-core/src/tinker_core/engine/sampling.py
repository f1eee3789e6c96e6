"""Sampling sessions and the samples in flight; they bypass the training queue."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.clock import Clock
from tinker_core.engine.futures import PendingResult
from tinker_core.engine.operations import inflight_name
from tinker_core.engine.registry import Registry
from tinker_core.errors import (
    CancelledRequestError,
    InvalidRequestError,
    LostWeightsError,
    TinkerError,
    UnknownCheckpointError,
    UnsupportedFeatureError,
    WorkerLostError,
)
from tinker_core.executors.rank_loop import describe_error
from tinker_core.types import (
    ACTIVE,
    CheckpointRecord,
    CreateSamplingSessionInput,
    EngineOutput,
    PreparedSample,
    QueueState,
    QueueStatus,
    SampleInput,
    SamplerRecord,
    SessionRecord,
)

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 2.0
"""How long the answer to a poll may wait for the sampler, which answers between two pieces of work."""
_NO_SLOT = "waiting for a sampler slot"
_LOADING = QueueStatus(state=QueueState.PAUSED_CAPACITY, reason="waiting for room for these weights in the sampler")


class Sampling:
    """Opens sampling sessions and runs samples on the sampler of their base model."""

    def __init__(
        self,
        registry: Registry,
        checkpoints: Checkpoints,
        clock: Clock,
        *,
        resolve: Callable[[str, EngineOutput], None],
    ) -> None:
        self._registry = registry
        self._checkpoints = checkpoints
        self._clock = clock
        self._resolve = resolve
        self._running: dict[str, asyncio.Task[None]] = {}
        """The task of each sample by request id."""
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
        request_id = entry.accepted.request_id
        task = asyncio.create_task(self._run(request, record, entry, base))
        self._running[request_id] = task
        self.in_progress[base.spec.name] += 1

        def end(_: asyncio.Task[None]) -> None:
            del self._running[request_id]
            self.in_progress[base.spec.name] -= 1

        task.add_done_callback(end)

    async def cancel(self, request_id: str) -> None:
        """End a sample in progress, wherever it is, and fail its future; one that is not in progress is left alone."""
        task = self._running.get(request_id)
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        # A sample that ended in the same moment has its result already, and keeps it.
        self._resolve(request_id, describe_error(CancelledRequestError(request_id)))

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

    async def _run(self, request: SampleInput, record: SamplerRecord, entry: PendingResult, base: BaseModel) -> None:
        output: EngineOutput
        request_id = entry.accepted.request_id
        try:
            await base.wait_started()
            name = await self._revision(record, base)
            entry.status = _LOADING
            async with base.revisions.use(name) as revision:
                entry.status, entry.started_at = ACTIVE, self._clock.monotonic()
                sample = PreparedSample(request_id=request_id, revision=revision, request=request)
                output = await base.sampler.sample(sample)
        except Exception as error:
            if not isinstance(error, TinkerError):
                log.exception("sample %s failed", request_id)
            output = describe_error(error)
        self._resolve(request_id, output)

    async def _revision(self, record: SamplerRecord, base: BaseModel) -> str | None:
        """The revision that a session serves now, made known to the sampler if it has files."""
        if record.revision is None:
            return None
        if record.model_path is not None:
            return await self._saved_revision(record, record.model_path, base)
        revision = self._ephemeral_revision(record.revision)
        if revision is None or not base.revisions.knows(revision):
            raise LostWeightsError(record.sampling_session_id)
        return revision

    def _ephemeral_revision(self, name: str) -> str | None:
        """The revision that an ephemeral session's name stands for: itself, or a model's inflight target."""
        model_id, _, _ = name.rpartition("@")
        return self._registry.inflight.get(model_id) if name == inflight_name(model_id) else name

    async def _saved_revision(self, record: SamplerRecord, path: str, base: BaseModel) -> str:
        """Saved weights stay available to the sampling sessions that opened them, also when the path is deleted."""
        assert record.revision is not None
        if not base.revisions.knows(record.revision):
            checkpoint = await self._checkpoints.get(path, record.owner)
            if _revision_of(checkpoint) != record.revision:
                raise UnknownCheckpointError(path)
            base.revisions.add_files(record.revision, await self._checkpoints.directory(checkpoint))
        return record.revision

    async def release(self, session_id: str, bases: Mapping[str, BaseModel]) -> None:
        """Drop the ephemeral weights of a finished session, once nobody samples from them."""
        for record in self._registry.forget_samplers_of(session_id):
            base = bases[record.base_model]
            if record.revision is None or record.model_path is not None or not base.has_sampler:
                continue
            revision = self._ephemeral_revision(record.revision)
            if revision is not None:
                try:
                    await base.revisions.drop(revision)
                except WorkerLostError:
                    continue  # it went with its process
        self._registry.forget_inflight_of(session_id)

    async def close(self) -> None:
        """End the samples in flight; their clients will see a server that stopped."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _restarting(base: BaseModel) -> QueueStatus:
    return QueueStatus(state=QueueState.PAUSED_CAPACITY, reason=f"base model {base.spec.name!r} is restarting")


def _revision_of(checkpoint: CheckpointRecord) -> str:
    """A name for exactly these files: a path that is deleted and saved again is another revision."""
    return f"{checkpoint.path}@{checkpoint.request_id}"
