"""The engine: one door for everything a server does with models. Knows no HTTP and no plugin."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from tinker_core.engine.abandonment import Abandonment
from tinker_core.engine.acceptance import (
    Acceptance,
    sampling_session_id_of,
    slot_identity,
)
from tinker_core.engine.accounts import Accounts
from tinker_core.engine.admission import Admission, offers_custom_losses
from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.catalogue import Catalogue
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.clock import Clock, SystemClock
from tinker_core.engine.config import EngineConfig, NewSession, Readiness, SessionContents
from tinker_core.engine.counters import Counters
from tinker_core.engine.futures import FutureTable
from tinker_core.engine.intake import Intake, base_named
from tinker_core.engine.library import Library
from tinker_core.engine.lock import data_dir_lock
from tinker_core.engine.models import release_models
from tinker_core.engine.operations import Operations
from tinker_core.engine.polls import Polls
from tinker_core.engine.registry import Registry
from tinker_core.engine.request_ids import RequestIds
from tinker_core.engine.sampling import Sampling
from tinker_core.engine.traces import Traces
from tinker_core.plugins import Plugins
from tinker_core.scheduler import Work
from tinker_core.storage.checkpoints import CheckpointStore
from tinker_core.storage.control import ControlStore
from tinker_core.storage.database import database_url
from tinker_core.storage.secret import derive_key, load_secret
from tinker_core.types import (
    AcceptedRequest,
    Caller,
    CreateSamplingSessionInput,
    EngineMetrics,
    EngineOutput,
    EngineRequest,
    ModelMetadata,
    RequestError,
    RequestType,
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
        self._bases: dict[str, BaseModel] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._releases: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()
        self._admission = Admission()
        self._stack = AsyncExitStack()
        self.counters = Counters()
        """What was done since the start."""
        self.accounts: Accounts
        """The users of the server: keys, limits, usage and audit log; there once the engine is entered."""
        self.library: Library
        """Saved weights and what is done with them besides saving and loading; there once the engine is entered."""
        self.catalogue: Catalogue
        """Sessions as they are searched and arranged; there once the engine is entered."""
        self.traces = Traces(config.data_dir / "traces")
        """What the requests of each session did when."""
        self.polls: Polls
        """Answers about requests in flight; there once the engine is entered."""
        self._secret: bytes
        self._futures: FutureTable
        self._acceptance: Acceptance
        self._registry: Registry
        self._checkpoints: Checkpoints
        self._operations: Operations
        self._sampling: Sampling
        self._intake: Intake

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._open_storage(stack)
            self._stack = stack.pop_all()
        self._operations = Operations(self._checkpoints, self._registry, self._clock, resolve=self._resolve)
        self._acceptance = Acceptance(self._futures)
        self._sampling = Sampling(self._registry, self._checkpoints, self._clock, resolve=self._resolve)
        self._intake = Intake(
            registry=self._registry,
            acceptance=self._acceptance,
            admission=self._admission,
            limiter=self.accounts.limiter,
            checkpoints=self._checkpoints,
            operations=self._operations,
            sampling=self._sampling,
            futures=self._futures,
            clock=self._clock,
            bases=self._bases,
            resolve=self._resolve,
            run_behind=self._run_behind,
        )
        self.polls = Polls(self._futures, self._registry, self._sampling, self._bases)
        for spec in self._config.base_models:
            self._bases[spec.name] = BaseModel(
                spec,
                self._config,
                self._plugins,
                self._clock,
                execute=self._execute,
                resolve=self._resolve,
            )
        self._tasks = [asyncio.create_task(base.run()) for base in self._bases.values()]
        if self._config.session_seconds is not None:
            abandonment = Abandonment(
                self._registry, self._clock, self._config.session_seconds, end=self._end_abandoned_session
            )
            self._tasks.append(asyncio.create_task(abandonment.run()))
        return self

    async def _open_storage(self, stack: AsyncExitStack) -> None:
        data_dir = self._config.data_dir
        await asyncio.to_thread(data_dir.mkdir, parents=True, exist_ok=True)
        stack.enter_context(data_dir_lock(data_dir))
        self._secret = await asyncio.to_thread(load_secret, data_dir)
        self._futures = FutureTable(
            self._clock, RequestIds(self.signing_key("request ids")), self._config.max_result_bytes
        )
        control = await ControlStore.open(database_url(data_dir))
        stack.push_async_callback(control.close)
        self.accounts = await stack.enter_async_context(Accounts(control, self._clock, self._can_progress))
        store = CheckpointStore(data_dir / "checkpoints")
        await asyncio.to_thread(store.sweep)
        self._registry = Registry(control)
        self._checkpoints = Checkpoints(store, control, self._clock, self.accounts)
        audit = self.accounts.audit
        library = Library(self._checkpoints, self._registry, self._clock, audit, is_taken=self._is_being_made)
        self.library = await stack.enter_async_context(library)
        self.catalogue = Catalogue(self._registry, audit, self._clock)
        await asyncio.to_thread(self.traces.clear_files)

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

    def now(self) -> datetime:
        """The aware UTC time of the engine's clock."""
        return self._clock.now()

    def signing_key(self, purpose: str) -> bytes:
        """A secret key that is the same after a restart, and another for every purpose."""
        return derive_key(self._secret, purpose)

    def offers_custom_losses(self) -> bool:
        """Whether every base model that trains is ready to run custom losses itself."""
        return all(offers_custom_losses(base) for base in self._bases.values() if base.spec.trainable)

    def architecture_of(self, base_model: str) -> str:
        """The architecture of a base model."""
        return self._base(base_model).capabilities.trainer.architecture

    def metrics(self) -> tuple[EngineMetrics, ...]:
        """Counters of every base model."""
        done = self.counters
        return tuple(
            EngineMetrics(
                base_model=name,
                queued_requests=base.scheduler.num_queued(),
                running_requests=base.scheduler.num_running(),
                resident_models=len(base.resident_models),
                resident_revisions=base.revisions.num_resident if base.has_sampler else 0,
                completed_requests=done.completed[name],
                failed_requests=done.failed[name],
                samples_in_progress=self._sampling.in_progress[name],
                trained_tokens=done.trained_tokens[name],
                prefilled_tokens=done.prefilled_tokens[name],
                sampled_tokens=done.sampled_tokens[name],
            )
            for name, base in self._bases.items()
        )

    def _base(self, name: str) -> BaseModel:
        return base_named(name, self._bases)

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
        self._registry.saw(record.session_id, self._clock.monotonic())
        return record

    async def heartbeat(self, session_id: str, owner: str) -> None:
        """Note that a client lives; raises `UnknownSessionError` or `SessionFinishedError`."""
        await self._registry.require_open(session_id, owner)
        self._registry.saw(session_id, self._clock.monotonic())

    async def finish_session(self, session_id: str, reason: str, detail: str | None, owner: str) -> None:
        """Close a session: its models and ephemeral weights are released once their accepted work is done."""
        record = await self._registry.session(session_id, owner)
        await self._registry.finish_session(record, self._clock.now(), reason, detail)
        release = self._run_behind(self._release(session_id))
        if not self._futures.pending(lambda entry: (entry.accepted.model_id or "").startswith(f"{session_id}:")):
            await release  # nothing to wait for: what comes next finds the room

    async def _end_abandoned_session(self, session_id: str, detail: str) -> None:
        record = await self._registry.control.get_session(session_id)
        if record is None:
            return
        await self.polls.cancel_session(session_id)
        await self.finish_session(session_id, "interrupted", detail, record.owner)

    async def _release(self, session_id: str) -> None:
        await release_models(session_id, self._registry, self._bases, self._futures)
        self._admission.forget(session_id)
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
        return await self._intake.submit(request, caller)

    async def submit_failed(
        self, model_id: str, seq_id: int, request_type: RequestType, error: RequestError, caller: Caller
    ) -> AcceptedRequest:
        """Accept a request that could not be decoded: it fails, and keeps its place in its model's order."""
        return await self._intake.submit_failed(model_id, seq_id, request_type, error, caller)

    async def submit_failed_sample(
        self, sampling_session_id: str, seq_id: int, error: RequestError, caller: Caller
    ) -> AcceptedRequest:
        """Accept a sample that could not be decoded: it fails, as one that could not be served does."""
        return await self._intake.submit_failed_sample(sampling_session_id, seq_id, error, caller)

    async def retrieve(self, request_id: str, timeout: float, owner: str) -> EngineOutput | None:  # noqa: ASYNC109
        """The result of a request as soon as it is there; None when ``timeout`` seconds pass first."""
        return await self._futures.wait(request_id, owner, timeout)

    def _can_progress(self, model_id: str) -> bool:
        return any(base.scheduler.can_progress(model_id) for base in self._bases.values())

    def _run_behind(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)
        return task

    def _is_being_made(self, owner: str, model_id: str) -> bool:
        return self._acceptance.find(owner, slot_identity(model_id, 0)) is not None

    async def _execute(self, base: BaseModel, work: Work) -> None:
        for request in work.requests:
            self._futures.mark_started(request.request_id)
        await self._operations.execute(base, work)

    def _resolve(self, request_id: str, output: EngineOutput) -> None:
        self._operations.discard(request_id)
        entry = self._futures.resolve(request_id, output)
        if entry is None:
            return
        metered = self.accounts.limiter.end(request_id)
        if metered is not None:
            self.accounts.usage.count_result(metered, output)
            self.counters.note_tokens(metered.base_model, metered.num_tokens, output)
        error = output if isinstance(output, RequestError) else None
        seconds = self._clock.monotonic() - entry.accepted_at
        self.counters.note(entry.base_model, entry.accepted.request_type, seconds, output)
        if error is not None and error.category == "server":
            log.error("request %s failed: %s", request_id, error.message)
        self.traces.note(entry, self._clock.monotonic(), error)
        self._plugins.request_finished(
            request_id=request_id,
            request_type=entry.accepted.request_type,
            model_id=entry.accepted.model_id,
            seconds=seconds,
            error=error,
        )

    # --- sampling sessions --------------------------------------------------------------------------------------------

    async def create_sampling_session(self, request: CreateSamplingSessionInput, owner: str) -> SamplerRecord:
        """Open a sampling session, once."""
        session = await self._registry.require_open(request.session_id, owner)
        session_id = sampling_session_id_of(request.session_id, request.sampling_session_seq_id)
        async with self._opening:  # two copies of one request may arrive together
            repeated = await self._registry.find_sampler(session_id)
            if repeated is not None:
                return repeated
            return await self._sampling.open(request, session_id, session, self._base)

    async def join_sampling_session(self, sampling_session_id: str, owner: str) -> int:
        """A number, from 1 up, that no other clone of the sampling session's client has or ever gets."""
        record = await self._registry.sampler(sampling_session_id, owner)
        return await self._registry.control.add_sampler_clone(record.sampling_session_id)

    async def sampler(self, sampling_session_id: str, owner: str) -> SamplerRecord:
        """One sampling session."""
        return await self._registry.sampler(sampling_session_id, owner)

    # --- training runs ------------------------------------------------------------------------------------------------

    async def training_run(self, model_id: str, owner: str) -> TrainingRunRecord:
        """One training run, live or past."""
        return await self._registry.run(model_id, owner)

    async def training_runs(
        self, owner: str, limit: int, offset: int, project_id: str | None = None
    ) -> tuple[list[TrainingRunRecord], int]:
        """Training runs, newest first, and how many there are in all."""
        runs, total = await self._registry.control.list_runs(owner, limit, offset, project_id=project_id)
        return [self._registry.freshen(run) for run in runs], total
