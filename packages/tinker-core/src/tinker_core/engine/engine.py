"""The engine: one door for everything a server does with models. Knows no HTTP and no plugin."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tinker_core.engine.acceptance import (
    Acceptance,
    model_of,
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
from tinker_core.engine.figures import durability_metrics, total_lag
from tinker_core.engine.futures import DELIVERED_SECONDS, FutureTable, PendingResult
from tinker_core.engine.identity import open_control
from tinker_core.engine.intake import Intake, base_named
from tinker_core.engine.library import Library
from tinker_core.engine.lock import data_dir_lock, make_data_dir
from tinker_core.engine.model_state import snapshot_of
from tinker_core.engine.operations import Operations
from tinker_core.engine.payloads import Payloads
from tinker_core.engine.polls import Polls
from tinker_core.engine.recovery import Recovery
from tinker_core.engine.registry import Registry
from tinker_core.engine.request_ids import RequestIds
from tinker_core.engine.sampling import Sampling
from tinker_core.engine.sessions import Sessions
from tinker_core.engine.settlement import Settlement
from tinker_core.engine.snapshots import SnapshotFiles
from tinker_core.engine.traces import Traces
from tinker_core.errors import JournalError, StorageError
from tinker_core.logs import log_context
from tinker_core.plugins import Plugins
from tinker_core.scheduler import Work
from tinker_core.storage.checkpoints import open_checkpoint_store
from tinker_core.storage.database import Database
from tinker_core.storage.journal import Journal
from tinker_core.storage.secret import derive_key, load_secret
from tinker_core.types import (
    AcceptedRequest,
    AgreementReport,
    Caller,
    CreateSamplingSessionInput,
    DurabilityMetrics,
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

PRUNE_SECONDS = 60.0
"""Results whose time is over are dropped that often at most."""


class OpenJournal(Protocol):
    """Opens the journal of an engine."""

    def __call__(self, directory: Path, *, max_bytes: int, max_result_bytes: int | None = None) -> Awaitable[Journal]:
        """See `Journal.open`."""


class Engine:
    """Serves several base models. An async context manager: entering returns at once, workers start behind it.

    Requests are accepted by `submit` and answered by `retrieve`.  A training request never raises from ``submit``: its
    failure is the result of its own future.  What is answered at once raises `TinkerError`.
    """

    def __init__(
        self,
        config: EngineConfig,
        plugins: Plugins,
        *,
        clock: Clock | None = None,
        open_journal: OpenJournal = Journal.open,
    ) -> None:
        self._config = config
        self._plugins = plugins
        self._clock = clock or SystemClock()
        self._open_journal = open_journal
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
        self.database: Database
        """The control database; there once the engine is entered."""
        self.traces = Traces(config.data_dir / "traces")
        """What the requests of each session did when."""
        self.polls: Polls
        """Answers about requests in flight; there once the engine is entered."""
        self._secret: bytes
        self._journal: Journal
        self._futures: FutureTable
        self._acceptance: Acceptance
        self._registry: Registry
        self._checkpoints: Checkpoints
        self._payloads: Payloads
        self._resolve: Settlement
        self._operations: Operations
        self._sampling: Sampling
        self._sessions: Sessions
        self._intake: Intake

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._open_storage(stack)
            self._stack = stack.pop_all()
        try:
            await self._assemble()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _assemble(self) -> None:
        """Put the parts together, with what an earlier process left, and start what runs by itself."""
        self._make_parts()
        left = await self._journal.recover()
        files = SnapshotFiles(self._config.data_dir / "snapshots")
        await asyncio.to_thread(files.sweep, {row.model_id: snapshot_of(row) for row in left.models})
        for spec in self._config.base_models:
            self._bases[spec.name] = BaseModel(
                spec,
                self._config,
                self._plugins,
                self._clock,
                journal=self._journal,
                files=files,
                payloads=self._payloads,
                registry=self._registry,
                execute=self._execute,
                resolve=self._resolve,
                on_idle=self.accounts.limiter.backlog.recheck,
            )
            await asyncio.to_thread(self._bases[spec.name].revisions.load)
        recovery = Recovery(
            journal=self._journal,
            registry=self._registry,
            acceptance=self._acceptance,
            admission=self._admission,
            limiter=self.accounts.limiter,
            payloads=self._payloads,
            sampling=self._sampling,
            intake=self._intake,
            clock=self._clock,
            bases=self._bases,
            resolve=self._resolve,
        )
        await recovery.run(left)
        await self._sessions.release_finished()
        for name, base in self._bases.items():
            with log_context(base_model=name):
                self._tasks.append(asyncio.create_task(base.run()))
        self._tasks.append(asyncio.create_task(self._prune()))
        self._tasks += [asyncio.create_task(silence.run()) for silence in self._sessions.silences(self._config)]

    def _make_parts(self) -> None:
        self._payloads = Payloads(self._journal)
        self._resolve = Settlement(
            futures=self._futures,
            journal=self._journal,
            payloads=self._payloads,
            bases=self._bases,
            deliver=self._deliver,
            run_behind=self._run_behind,
        )
        self._operations = Operations(
            self._checkpoints,
            self._registry,
            self._clock,
            self._payloads,
            resolve=self._resolve,
            complete=self._complete,
        )
        self._acceptance = Acceptance(self._futures, self._journal, self._clock)
        self._sampling = Sampling(
            self._registry,
            self._checkpoints,
            self._clock,
            resolve=self._resolve,
            deterministic=self._config.deterministic,
        )
        self.polls = Polls(self._futures, self._registry, self._sampling, self._bases, self._clock)
        self._make_doors()

    def _make_doors(self) -> None:
        """Where requests come in, and where sessions begin and end."""
        self._intake = Intake(
            registry=self._registry,
            acceptance=self._acceptance,
            admission=self._admission,
            limiter=self.accounts.limiter,
            checkpoints=self._checkpoints,
            payloads=self._payloads,
            sampling=self._sampling,
            futures=self._futures,
            clock=self._clock,
            bases=self._bases,
            resolve=self._resolve,
            run_behind=self._run_behind,
        )
        self._sessions = Sessions(
            registry=self._registry,
            futures=self._futures,
            journal=self._journal,
            admission=self._admission,
            sampling=self._sampling,
            polls=self.polls,
            bases=self._bases,
            clock=self._clock,
            run_behind=self._run_behind,
        )

    async def _open_storage(self, stack: AsyncExitStack) -> None:
        data_dir = self._config.data_dir
        await asyncio.to_thread(make_data_dir, data_dir)
        stack.enter_context(data_dir_lock(data_dir))
        self._secret = await asyncio.to_thread(load_secret, data_dir)
        config = self._config
        self._journal = await self._open_journal(
            data_dir / "journal", max_bytes=config.journal_bytes, max_result_bytes=config.max_result_bytes
        )
        stack.push_async_callback(self._journal.close)
        self._futures = FutureTable(self._clock, RequestIds(self.signing_key("request ids")), self._journal)
        control = await open_control(config, self._clock.now())
        stack.push_async_callback(control.close)
        accounts = Accounts(control, self._clock, self._can_progress, self._config.load_bounds)
        self.accounts = await stack.enter_async_context(accounts)
        self.database = control.database
        server_id = control.server_id
        assert server_id is not None
        store = open_checkpoint_store(config.checkpoint_store, data_dir, config.checkpoint_cache_bytes, server_id)
        self._registry = Registry(control)
        self._checkpoints = Checkpoints(store, control, self._clock, self.accounts, writer=server_id)
        audit = self.accounts.audit
        library = Library(
            self._checkpoints,
            self._registry,
            self._clock,
            audit,
            is_taken=self._is_being_made,
            keep_last=config.keep_last,
        )
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
        for base in self._bases.values():
            await base.residence.close()
        try:
            for run in self._registry.live_models():
                await self._registry.control.touch_run(run.model_id, run.last_request_at)
        except StorageError as unwritten:
            log.error("when models were last used is not recorded: %s", unwritten)
        await self._stack.aclose()

    # --- what is served -----------------------------------------------------------------------------------------------

    def readiness(self) -> Readiness:
        """Which base models can work now."""
        models = {name: _state_of(base) for name, base in self._bases.items()}
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

    @property
    def config(self) -> EngineConfig:
        """Its settings."""
        return self._config

    @property
    def clock(self) -> Clock:
        """Its time."""
        return self._clock

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
                oldest_queued_seconds=base.scheduler.longest_wait(self._clock.monotonic()),
                resident_models=base.residence.num_resident,
                parked_models=base.residence.num_parked,
                worker_losses=base.num_restarts,
                recovery_seconds=base.recovery_seconds,
                resident_revisions=base.revisions.num_resident,
                stored_revisions=base.revisions.num_stored,
                stored_revision_bytes=base.revisions.stored_bytes,
                completed_requests=done.completed[name],
                failed_requests=done.failed[name],
                samples_in_progress=self._sampling.in_progress[name],
                samples_waiting=self._sampling.num_waiting(name),
                trained_tokens=done.trained_tokens[name],
                prefilled_tokens=done.prefilled_tokens[name],
                sampled_tokens=done.sampled_tokens[name],
                agreement=base.agreement.report,
            )
            for name, base in self._bases.items()
        )

    async def compare_sides(self, base_model: str) -> AgreementReport:
        """Compare trainer and sampler of a base model again; while they disagree, the engine is not ready.

        Raises `UnknownBaseModelError`, `UnsupportedFeatureError` where that cannot be done, and `WorkerLostError`.
        """
        return await self._base(base_model).compare_sides()

    def durability(self) -> DurabilityMetrics:
        """How far what was accepted is from being safe."""
        return durability_metrics(
            self._journal.stats(), total_lag(base.residence.lag() for base in self._bases.values())
        )

    async def wait_failed(self) -> JournalError:
        """Return when nothing can be kept any more, with the reason: the engine has to end, and another to start."""
        return await self._journal.wait_failed()

    async def drain(self, seconds: float) -> bool:
        """Let accepted work that can go on do so, for at most so long; whether all of it is done by then.

        In what time is left, the models' states are written, so that the next start has nothing to do again.
        """
        deadline = self._clock.monotonic() + seconds
        left: set[asyncio.Future[EngineOutput]] = set()
        running = [entry.done for entry in self._futures.pending(self._goes_on)]
        if running:
            _, left = await asyncio.wait(running, timeout=seconds)
        ready = [base for base in self._bases.values() if base.state == "ready"]
        await asyncio.gather(*(base.residence.flush(deadline) for base in ready))
        return not left

    def _goes_on(self, entry: PendingResult) -> bool:
        """Whether a request without a result neither waits for workers nor for another request."""
        base = self._bases.get(entry.base_model)
        if base is None or base.state != "ready":
            return False
        return entry.accepted.model_id is None or base.scheduler.can_progress(entry.accepted.model_id)

    def _base(self, name: str) -> BaseModel:
        return base_named(name, self._bases)

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def create_session(self, session: NewSession) -> SessionRecord:
        """Open a session."""
        return await self._sessions.create(session)

    async def heartbeat(self, session_id: str, owner: str) -> None:
        """Note that a client lives; raises `UnknownSessionError` or `SessionFinishedError`."""
        await self._sessions.heartbeat(session_id, owner)

    async def finish_session(self, session_id: str, reason: str, detail: str | None, owner: str) -> None:
        """Close a session: its models and ephemeral weights are released once their accepted work is done."""
        await self._sessions.finish(session_id, reason, detail, owner)

    async def session(self, session_id: str, owner: str) -> SessionRecord:
        """One session."""
        return await self._registry.session(session_id, owner)

    async def sessions(self, owner: str, limit: int, offset: int) -> tuple[list[SessionRecord], int]:
        """Sessions, newest first, and how many there are in all."""
        return await self._registry.control.list_sessions(owner, limit, offset)

    async def session_contents(self, session_id: str, owner: str) -> SessionContents:
        """The ids of what was made in a session."""
        return await self._sessions.contents(session_id, owner)

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
        return self._acceptance.is_known(owner, slot_identity(model_id, 0))

    async def _execute(self, base: BaseModel, work: Work) -> None:
        again = []
        for request in work.requests:
            entry = self._futures.mark_started(request.request_id)
            if entry is not None and entry.recovered and not entry.settled:
                again.append(entry.number)
        if again:  # should this be what ended the server, it ends it a few times only
            await self._journal.note_attempts(again)
        began = self._clock.monotonic()
        try:
            with log_context(model_id=", ".join(request.model_id for request in work.requests)):
                await self._operations.execute(base, work)
        finally:
            self.counters.note_work(base.spec.name, work, self._clock.monotonic() - began, self._config.pass_tokens)

    def _complete(self, base: BaseModel, request: EngineRequest) -> EngineRequest:
        """What admission makes of a request that was read from the journal."""
        return self._admission.admit(request, self._registry.model(model_of(request) or ""), base)

    async def _prune(self) -> None:
        """Drop results whose time is over, for ever."""
        never = asyncio.Event()
        while True:
            now = self._clock.now().timestamp()
            next_end = await self._journal.prune(now)
            # What is fetched meanwhile ends sooner than it said, but not before this.
            wait = DELIVERED_SECONDS if next_end is None else min(DELIVERED_SECONDS, next_end - now)
            await self._clock.wait(never, self._clock.monotonic() + max(PRUNE_SECONDS, wait))

    def _deliver(self, entry: PendingResult, output: EngineOutput) -> None:
        request_id = entry.accepted.request_id
        metered = self.accounts.limiter.end(request_id)
        if metered is not None:
            self.accounts.usage.count_result(metered, output)
            self.counters.note_tokens(metered.base_model, metered.num_tokens, output)
        error = output if isinstance(output, RequestError) else None
        seconds = self._clock.monotonic() - entry.accepted_at
        self.counters.note(entry.base_model, entry.accepted.request_type, seconds, output)
        if error is not None and error.category == "server":
            about = {"request_id": request_id, "model_id": entry.accepted.model_id, "owner": entry.owner}
            log.error("request %s failed: %s", request_id, error.message, extra=about)
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


def _state_of(base: BaseModel) -> str:
    """As `Readiness` shows it."""
    doubt = base.agreement.doubt
    return f"doubtful: {doubt}" if base.state == "ready" and doubt is not None else base.state
