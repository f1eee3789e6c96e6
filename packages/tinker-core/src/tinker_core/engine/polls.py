"""What clients ask about requests in flight: why one waits, which samples have their results, and to stop one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tinker_core.engine.acceptance import sample_scope
from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.clock import Clock
from tinker_core.engine.futures import FutureTable, PendingResult
from tinker_core.engine.registry import Registry
from tinker_core.engine.sampling import Sampling
from tinker_core.errors import ResultGoneError, UnsupportedFeatureError
from tinker_core.types import (
    ACTIVE,
    CompletionPage,
    QueueState,
    QueueStatus,
    RequestType,
    SampleTarget,
    session_of_run,
)


class Polls:
    """Answers about futures, besides their results."""

    def __init__(
        self,
        futures: FutureTable,
        registry: Registry,
        sampling: Sampling,
        bases: Mapping[str, BaseModel],
        clock: Clock,
    ) -> None:
        self._futures = futures
        self._registry = registry
        self._sampling = sampling
        self._bases = bases
        self._clock = clock

    async def queue_status(self, request_id: str, owner: str) -> QueueStatus:
        """What holds up a request that has no result yet; raises what fetching its result raises."""
        entry = self._futures.get(request_id, owner)
        self._saw_client_of(entry)
        base = self._bases.get(entry.base_model)
        if entry.done.done() or entry.status != ACTIVE or base is None:
            return entry.status
        waits_for_workers = base.state != "ready" and not (entry.target is not None and base.has_sampler)
        if waits_for_workers:
            reason = f"base model {base.spec.name!r} is starting"
            return QueueStatus(state=QueueState.PAUSED_CAPACITY, reason=reason)
        if entry.target is None:
            return ACTIVE
        return await self._sampling.queue_status(request_id, base)

    async def completions(
        self,
        target: SampleTarget,
        owner: str,
        *,
        cursor: int,
        timeout: float,  # noqa: ASYNC109
        retrieved: Collection[str] = (),
    ) -> CompletionPage:
        """Which samples of one sampling client have their results since a cursor, as soon as there is one.

        Results that the client has ``retrieved`` are dropped first. A client that was told nothing yet, or only by an
        earlier process, is told of all results that are kept for it. Raises `UnknownSamplerError`.
        """
        record = await self._registry.sampler(target.sampling_session_id, owner)
        self._registry.saw(record.session_id, self._clock.monotonic())
        self._futures.release(target, retrieved)
        if not self._futures.issued(cursor):
            await self._futures.recall(target, sample_scope(owner, target.sampling_session_id))
            cursor = 0
        return await self._futures.completions(target, owner, cursor, timeout)

    def _saw_client_of(self, entry: PendingResult) -> None:
        """Whoever asks for results is there, also without heartbeats."""
        if entry.target is not None:
            session_id: str | None = entry.target.sampling_session_id.rpartition(":sample:")[0]
        else:
            session_id = session_of_run(entry.accepted.model_id or "")
        if session_id:
            self._registry.saw(session_id, self._clock.monotonic())

    async def cancel(self, request_id: str, owner: str) -> None:
        """Stop a sample, running or waiting, and fail its future; one that has its result keeps it.

        Raises `UnknownRequestError`, and `UnsupportedFeatureError` for requests other than samples.
        """
        try:
            entry = self._futures.get(request_id, owner)
        except ResultGoneError:
            return  # there is nothing left to stop
        if entry.accepted.request_type is not RequestType.SAMPLE:
            raise UnsupportedFeatureError("only samples can be cancelled; a training request runs in its model's order")
        await self._sampling.cancel(request_id)

    async def cancel_session(self, session_id: str) -> None:
        """Stop all samples of a session."""
        for entry in self._futures.pending(lambda entry: entry.samples_in(session_id)):
            await self._sampling.cancel(entry.accepted.request_id)
