"""The engine: one door for everything a server does with models. Knows no HTTP and no plugin."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from tinker_core.engine.acceptance import (
    Acceptance,
    creates_model,
    identity_of,
    model_of,
    sampling_session_id_of,
    seq_id_of,
    slot_identity,
    type_of,
)
from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.clock import Clock, SystemClock
from tinker_core.engine.config import EngineConfig, NewSession, Readiness, SessionContents
from tinker_core.engine.futures import FutureTable, PendingResult
from tinker_core.engine.lock import data_dir_lock
from tinker_core.engine.models import new_model, release_models
from tinker_core.engine.operations import Operations
from tinker_core.engine.registry import Registry
from tinker_core.engine.sampling import Sampling
from tinker_core.errors import (
    InvalidRequestError,
    SessionFinishedError,
    TinkerError,
    UnknownBaseModelError,
    UnsupportedFeatureError,
)
from tinker_core.executors.rank_loop import describe_error
from tinker_core.plugins import Plugins
from tinker_core.scheduler import QueuedRequest
from tinker_core.storage.checkpoints import CheckpointStore
from tinker_core.storage.control import ControlStore
from tinker_core.types import (
    AcceptedRequest,
    Caller,
    CheckpointRecord,
    CreateCustomLossInput,
    CreateModelInput,
    CreateSamplingSessionInput,
    EngineMetrics,
    EngineOutput,
    EngineRequest,
    ForwardBackwardInput,
    LoadWeightsInput,
    ModelMetadata,
    RequestError,
    RequestType,
    SampleInput,
    SamplerRecord,
    SessionRecord,
    TrainingRunRecord,
)

log = logging.getLogger(__name__)


class Engine:
    """Serves several base models. An async context manager: entering returns at once, workers start behind it.

    Requests are accepted by `submit` and answered by `retrieve`.  A training request never raises from ``submit``: its
    failure is the result of its own future.  What is answered at once raises `TinkerError`.
    """

    def __init__(self, config: EngineConfig, plugins: Plugins, *, clock: Clock | None = None) -> None:
        self._config = config
        self._plugins = plugins
        self._clock = clock or SystemClock()
        self._futures = FutureTable(self._clock)
        self._acceptance = Acceptance(self._futures)
        self._bases: dict[str, BaseModel] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._releases: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()
        self._completed: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._registry: Registry
        self._checkpoints: Checkpoints
        self._operations: Operations
        self._sampling: Sampling

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._open_storage(stack)
            self._stack = stack.pop_all()
        self._operations = Operations(self._checkpoints, self._registry, self._clock, resolve=self._resolve)
        self._sampling = Sampling(self._registry, self._checkpoints, self._clock, resolve=self._resolve)
        for spec in self._config.base_models:
            self._bases[spec.name] = BaseModel(
                spec,
                self._config,
                self._plugins,
                self._clock,
                execute=self._operations.execute,
                resolve=self._resolve,
            )
        self._tasks = [asyncio.create_task(base.run()) for base in self._bases.values()]
        return self

    async def _open_storage(self, stack: AsyncExitStack) -> None:
        data_dir = self._config.data_dir
        await asyncio.to_thread(data_dir.mkdir, parents=True, exist_ok=True)
        stack.enter_context(data_dir_lock(data_dir))
        control = await ControlStore.open(f"sqlite:///{data_dir / 'control.sqlite'}")
        stack.push_async_callback(control.close)
        store = CheckpointStore(data_dir / "checkpoints")
        await asyncio.to_thread(store.sweep)
        self._registry = Registry(control)
        self._checkpoints = Checkpoints(store, control, self._clock)
        await self._checkpoints.remove_expired()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._sampling.close()
        tasks = [*self._tasks, *self._releases]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for run in self._registry.live_models():
            await self._registry.control.touch_run(run.model_id, run.last_request_at)
        await self._stack.aclose()

    # --- what is served -----------------------------------------------------------------------------------------------

    def readiness(self) -> Readiness:
        """Which base models can work now."""
        models = {name: base.state for name, base in self._bases.items()}
        return Readiness(ready=all(state == "ready" for state in models.values()), models=models)

    async def wait_ready(self) -> None:
        """Return when all base models can work; raises the reason why one cannot."""
        await asyncio.gather(*(base.wait_started() for base in self._bases.values()))

    def supported_models(self) -> tuple[ModelMetadata, ...]:
        """The base models that are ready, as clients see them."""
        return tuple(
            ModelMetadata(
                model_name=name,
                max_context_length=base.capabilities.trainer.max_context_length,
                trainable=base.spec.trainable,
                sampleable=base.spec.sampleable and self._config.sampler is not None,
            )
            for name, base in self._bases.items()
            if base.state == "ready"
        )

    def architecture_of(self, base_model: str) -> str:
        """The architecture of a base model."""
        return self._base(base_model).capabilities.trainer.architecture

    def metrics(self) -> tuple[EngineMetrics, ...]:
        """Counters of every base model."""
        return tuple(
            EngineMetrics(
                base_model=name,
                queued_requests=base.scheduler.num_queued(),
                running_requests=base.scheduler.num_running(),
                resident_models=len(base.resident_models),
                resident_revisions=base.revisions.num_resident if base.has_sampler else 0,
                completed_requests=self._completed[name],
                failed_requests=self._failed[name],
            )
            for name, base in self._bases.items()
        )

    def _base(self, name: str) -> BaseModel:
        if name not in self._bases:
            raise UnknownBaseModelError(name, tuple(self._bases))
        return self._bases[name]

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def create_session(self, session: NewSession) -> SessionRecord:
        """Open a session."""
        record = SessionRecord(
            session_id=f"s-{secrets.token_urlsafe(16)}",
            created_at=self._clock.now(),
            owner=session.owner,
            project_id=session.project_id,
            tags=session.tags,
            user_metadata=session.user_metadata,
            sdk_version=session.sdk_version,
            display_name=session.display_name,
        )
        await self._registry.add_session(record)
        return record

    async def heartbeat(self, session_id: str, owner: str) -> None:
        """Note that a client lives; raises `UnknownSessionError` or `SessionFinishedError`."""
        await self._registry.require_open(session_id, owner)

    async def finish_session(self, session_id: str, reason: str, detail: str | None, owner: str) -> None:
        """Close a session: its models and ephemeral weights are released once their accepted work is done."""
        record = await self._registry.session(session_id, owner)
        await self._registry.finish_session(record, self._clock.now(), reason, detail)
        release = asyncio.create_task(self._release(session_id))
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)
        if not self._futures.pending(lambda entry: (entry.accepted.model_id or "").startswith(f"{session_id}:")):
            await release  # nothing to wait for: what comes next finds the room

    async def _release(self, session_id: str) -> None:
        await release_models(session_id, self._registry, self._bases, self._futures)
        await self._sampling.release(session_id, self._bases)

    async def session(self, session_id: str, owner: str) -> SessionRecord:
        """One session."""
        return await self._registry.session(session_id, owner)

    async def sessions(self, owner: str, limit: int, offset: int) -> tuple[list[SessionRecord], int]:
        """Sessions, newest first, and how many there are in all."""
        return await self._registry.control.list_sessions(owner, limit, offset)

    async def session_contents(self, session_id: str, owner: str) -> SessionContents:
        """The ids of what was made in a session."""
        await self._registry.session(session_id, owner)
        control = self._registry.control
        return SessionContents(
            training_run_ids=tuple(await control.list_run_ids(session_id)),
            sampler_ids=tuple(await control.list_sampler_ids(session_id)),
        )

    # --- requests -----------------------------------------------------------------------------------------------------

    async def submit(self, request: EngineRequest, caller: Caller) -> AcceptedRequest:
        """Accept a request, once: a repeat gets the first one's receipt."""
        if isinstance(request, SampleInput):
            record = await self._registry.sampler(request.sampling_session_id, caller.owner)
            await self._registry.require_open(record.session_id, caller.owner)
            return self._submit_sample(request, record, caller)
        await self._require_open_session(request, caller.owner)
        repeated = self._acceptance.find(identity_of(request))
        if repeated is not None:
            return repeated
        entry, request = self._acceptance.accept(request, caller)
        try:
            await self._route(request, entry)
        except TinkerError as error:
            self._resolve(entry.accepted.request_id, describe_error(error))
        return entry.accepted

    async def submit_failed(
        self, model_id: str, seq_id: int, request_type: RequestType, error: RequestError, caller: Caller
    ) -> AcceptedRequest:
        """Accept a request that could not be decoded: it fails, and keeps its place in its model's order."""
        repeated = self._acceptance.find(slot_identity(model_id, seq_id))
        if repeated is not None:
            return repeated
        entry = self._acceptance.accept_unreadable(request_type, caller, model_id, seq_id)
        self._resolve(entry.accepted.request_id, error)
        self._take_slot(entry, seq_id)
        return entry.accepted

    async def retrieve(self, request_id: str, timeout: float, owner: str) -> EngineOutput | None:  # noqa: ASYNC109
        """The result of a request as soon as it is there; None when ``timeout`` seconds pass first."""
        return await self._futures.wait(request_id, owner, timeout)

    async def _require_open_session(self, request: EngineRequest, owner: str) -> None:
        made_in = getattr(request, "session_id", None)  # of what makes something new in a session
        if made_in is not None:
            await self._registry.require_open(made_in, owner)
        else:
            session_id, _, _ = (model_of(request) or "").rpartition(":train:")
            if session_id in self._registry.finished_sessions:
                raise SessionFinishedError(session_id)

    async def _route(self, request: EngineRequest, entry: PendingResult) -> None:
        if isinstance(request, CreateCustomLossInput):
            raise UnsupportedFeatureError(
                "custom losses are not computed by this server; forward_backward_custom computes them in the client"
            )
        if creates_model(request):
            assert isinstance(request, CreateModelInput | LoadWeightsInput)
            new = await new_model(
                request, entry, session=self._registry.session, checkpoints=self._checkpoints, now=self._clock.now()
            )
            base = self._base(new.run.base_model)
            if not base.spec.trainable:
                raise UnsupportedFeatureError(f"base model {base.spec.name!r} is served for sampling only")
            entry.base_model = base.spec.name
            base.add_model(new.run.model_id)
            self._operations.prepare(entry.accepted.request_id, new)
        else:
            run = self._registry.model(model_of(request) or "", entry.owner)
            base = self._base(run.base_model)
            entry.base_model = base.spec.name
            self._registry.touch(run.model_id, self._clock.now())
            self._operations.prepare(entry.accepted.request_id, request)
        self._enqueue(base, request, entry)

    def _enqueue(self, base: BaseModel, request: EngineRequest, entry: PendingResult) -> None:
        num_tokens = 0
        if isinstance(request, ForwardBackwardInput):
            try:
                num_tokens = base.count_tokens(request.data)
            except TinkerError:
                self._take_slot(entry, request.seq_id)
                raise
        model_id = entry.accepted.model_id or ""
        base.submit(
            QueuedRequest(
                request_id=entry.accepted.request_id,
                request_type=type_of(request),
                model_id=model_id,
                seq_id=seq_id_of(request),
                num_tokens=num_tokens,
            )
        )

    def _take_slot(self, entry: PendingResult, seq_id: int) -> None:
        """Let a failed request's turn pass, so that its model's later requests do not wait for it."""
        try:
            run = self._registry.model(entry.accepted.model_id or "", entry.owner)
            self._base(run.base_model).submit(
                QueuedRequest(
                    request_id=entry.accepted.request_id,
                    request_type=entry.accepted.request_type,
                    model_id=run.model_id,
                    seq_id=seq_id,
                )
            )
        except TinkerError as error:
            log.info("request %s has no place in an order: %s", entry.accepted.request_id, error)

    def _submit_sample(self, request: SampleInput, record: SamplerRecord, caller: Caller) -> AcceptedRequest:
        repeated = self._acceptance.find(identity_of(request))
        if repeated is not None:
            return repeated
        if request.num_samples < 1:
            raise InvalidRequestError(f"num_samples={request.num_samples} must be at least 1")
        entry, request = self._acceptance.accept(request, caller)
        entry.base_model = record.base_model
        self._sampling.start(request, record, entry, self._base(record.base_model))
        return entry.accepted

    def _resolve(self, request_id: str, output: EngineOutput) -> None:
        self._operations.discard(request_id)
        entry = self._futures.resolve(request_id, output)
        if entry is None:
            return
        error = output if isinstance(output, RequestError) else None
        model_id = entry.accepted.model_id
        (self._completed if error is None else self._failed)[entry.base_model] += 1
        if error is not None and error.category == "server":
            log.error("request %s failed: %s", request_id, error.message)
        self._plugins.request_finished(
            request_id=request_id,
            request_type=entry.accepted.request_type,
            model_id=model_id,
            seconds=self._clock.monotonic() - entry.accepted_at,
            error=error,
        )

    # --- sampling sessions --------------------------------------------------------------------------------------------

    async def create_sampling_session(self, request: CreateSamplingSessionInput, owner: str) -> SamplerRecord:
        """Open a sampling session, once."""
        session = await self._registry.require_open(request.session_id, owner)
        session_id = sampling_session_id_of(request.session_id, request.sampling_session_seq_id)
        repeated = await self._registry.find_sampler(session_id)
        if repeated is not None:
            return repeated
        return await self._sampling.open(request, session_id, session, self._base)

    async def sampler(self, sampling_session_id: str, owner: str) -> SamplerRecord:
        """One sampling session."""
        return await self._registry.sampler(sampling_session_id, owner)

    # --- training runs and checkpoints --------------------------------------------------------------------------------

    async def training_run(self, model_id: str, owner: str) -> TrainingRunRecord:
        """One training run, live or past."""
        return await self._registry.run(model_id, owner)

    async def training_runs(
        self, owner: str, limit: int, offset: int, project_id: str | None = None
    ) -> tuple[list[TrainingRunRecord], int]:
        """Training runs, newest first, and how many there are in all."""
        runs, total = await self._registry.control.list_runs(owner, limit, offset, project_id=project_id)
        return [self._registry.freshen(run) for run in runs], total

    async def checkpoint(self, path: str, owner: str) -> CheckpointRecord:
        """One checkpoint."""
        return await self._checkpoints.get(path, owner)

    async def checkpoints(
        self, owner: str, run_id: str | None = None, limit: int | None = None, offset: int = 0
    ) -> tuple[list[CheckpointRecord], int]:
        """Checkpoints, newest first, and how many there are in all."""
        if run_id is not None:
            await self._registry.run(run_id, owner)
        return await self._checkpoints.list(owner, run_id, limit, offset)

    async def delete_checkpoint(self, path: str, owner: str) -> None:
        """Remove a checkpoint for good."""
        await self._checkpoints.delete(path, owner)

    async def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None, owner: str) -> None:
        """Let a checkpoint expire so many seconds from now, or never."""
        await self._checkpoints.set_ttl(path, ttl_seconds, owner)
