"""One base model: its workers, its queue, its models, and the loop that feeds the ones from the other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tinker_core.engine.agreement_gate import AgreementGate
from tinker_core.engine.agreement_probe import Pair
from tinker_core.engine.clock import Clock
from tinker_core.engine.config import EngineConfig
from tinker_core.engine.handoff import Handoff
from tinker_core.engine.interruption import to_its_end
from tinker_core.engine.live_weights import best_transport
from tinker_core.engine.own_sampler import OwnSampler
from tinker_core.engine.payloads import Payloads
from tinker_core.engine.registry import Registry
from tinker_core.engine.residence import Residence
from tinker_core.engine.revisions import Revisions
from tinker_core.engine.snapshots import SnapshotFiles
from tinker_core.engine.usage import Metered
from tinker_core.engine.workers import Workers, sampler_plugin, trainer_plugin
from tinker_core.errors import CapacityError, TinkerError, UnknownModelError, UnsupportedFeatureError, WorkerLostError
from tinker_core.executors.protocol import GroupCapabilities
from tinker_core.executors.rank_loop import describe_error
from tinker_core.interfaces import Sampler, WorkerGroup
from tinker_core.plugins import Plugins
from tinker_core.scheduler import QueuedRequest, Scheduler, Work
from tinker_core.storage.checkpoints import safe_directory_name
from tinker_core.storage.journal import Journal, ModelRow
from tinker_core.types import (
    AgreementReport,
    BaseModelSpec,
    Caller,
    Datum,
    EngineOutput,
    Placement,
    RequestType,
    SampleInput,
    SamplerRecord,
    TinkerPath,
    Transport,
)

log = logging.getLogger(__name__)

Execute = Callable[["BaseModel", Work], Awaitable[None]]
"""Runs one piece of work and settles its requests; raises `WorkerLostError` and then leaves those that are not."""
Resolve = Callable[[str, EngineOutput], None]

_FIRST_STARTS = 3
"""How often workers may die while they start for the first time, before that is taken for what always happens."""
_STORING = (
    RequestType.SAVE_WEIGHTS,
    RequestType.SAVE_WEIGHTS_FOR_SAMPLER,
    RequestType.SAVE_WEIGHTS_EXTERNAL,
    RequestType.LOAD_WEIGHTS,
)
"""Requests that move files: other models need not wait for them."""
_RESTART_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses before workers that ran once, and do not come up again, are started anew; the last one repeats."""


class BaseModel:
    """Starts and restarts the workers of a base model, and runs its requests in order.

    When a worker dies, fresh ones start, and what was in its memory is brought back: see `Residence`.
    """

    recovery_seconds = 0.0
    """From the last loss of the workers until others were ready."""
    _lost_at: float | None = None
    num_restarts = 0
    """How often workers died and were started again."""
    state = "starting"
    _was_ready = False
    _workers: Workers | None = None
    _running: Work | None = None

    def __init__(
        self,
        spec: BaseModelSpec,
        config: EngineConfig,
        plugins: Plugins,
        clock: Clock,
        *,
        journal: Journal,
        files: SnapshotFiles,
        payloads: Payloads,
        registry: Registry,
        execute: Execute,
        resolve: Resolve,
        on_idle: Callable[[], None],
    ) -> None:
        self.spec = spec
        most = 1 if config.deterministic else config.max_resident
        self.scheduler = Scheduler(token_budget=config.pass_tokens, max_models_per_work=most)
        self._config = config
        self._plugins = plugins
        self._clock = clock
        self._execute = execute
        self._resolve = resolve
        self._on_idle = on_idle
        self._trainer = trainer_plugin(config, plugins)
        self._wake = asyncio.Event()
        self._started, self._own_started = _new_future(), _new_future()
        self._own = _own_sampler(spec, config, plugins)
        """A sampler beside the workers, which goes on when they die."""
        self.agreement = AgreementGate(spec, config, sampler_plugin(spec, config, plugins))
        """Whether trainer and sampler compute the same."""
        self._aside: dict[asyncio.Task[None], Work] = {}
        """Work that others do not wait for."""
        self._unfinished: list[QueuedRequest] = []
        """Of work beside the rest under which the workers died."""
        self.revisions = Revisions(config.data_dir / "revisions" / safe_directory_name(spec.name))
        """The sampler's revisions; they outlive the workers."""
        self.residence = Residence(
            config,
            scheduler=self.scheduler,
            journal=journal,
            files=files,
            payloads=payloads,
            registry=registry,
            revisions=self.revisions,
            clock=clock,
            wake=self._wake.set,
            resolve=resolve,
        )
        """Where the models are."""

    # --- what is there, once started ----------------------------------------------------------------------------------

    async def wait_started(self) -> None:
        """Return when the workers run, also again after a loss; raises why they do not."""
        await asyncio.shield(self._started)

    async def wait_sampler(self) -> Sampler:
        """The sampler, as soon as it runs; raises why it does not, or that there is none."""
        if self._own is not None:
            await asyncio.shield(self._own_started)
        else:
            await self.wait_started()
        return self.sampler

    def is_serving(self, sampler: Sampler) -> bool:
        """Whether a sampler is this base model's and has not ended with the workers."""
        if not self.has_sampler or self.sampler is not sampler:
            return False
        return self._own is not None or not self.group.is_lost

    @property
    def group(self) -> WorkerGroup:
        """The running workers."""
        return self._present().group

    @property
    def capabilities(self) -> GroupCapabilities:
        """What the workers offer."""
        return self._present().capabilities

    @property
    def sampler(self) -> Sampler:
        """The sampler of this base model."""
        sampler = self._present_sampler()
        if sampler is None:
            raise self._no_sampler()
        return sampler

    @property
    def has_sampler(self) -> bool:
        """Whether a sampler is running."""
        return self._present_sampler() is not None

    def _present_sampler(self) -> Sampler | None:
        if self._own is not None:
            return self._own.sampler if self._own_started.done() else None
        return None if self._workers is None else self._workers.sampler

    def _present(self) -> Workers:
        if self._workers is None:
            raise WorkerLostError(f"the workers of base model {self.spec.name!r} are not running: {self.state}")
        return self._workers

    def _no_sampler(self) -> TinkerError:
        if self._config.sampler is None:
            return UnsupportedFeatureError("this server samples nothing; start it with --sampler")
        return WorkerLostError(f"the workers of base model {self.spec.name!r} are not running: {self.state}")

    @property
    def live_transport(self) -> Transport | None:
        """How weights go from a live model to the sampler; None when there is no way but a named save."""
        return best_transport(self.capabilities.trainer, self.sampler.capabilities())

    @property
    def handoff(self) -> Handoff | None:
        """Where weights lie on their way to a sampler beside the workers; None without one."""
        return None if self._own is None else self._own.handoff

    async def compare_sides(self) -> AgreementReport:
        """Compare trainer and sampler, between other work.

        Raises `UnsupportedFeatureError` where that cannot be done, and `WorkerLostError` while workers are not running.
        """
        if self._config.sampler is None or not self.spec.sampleable:
            raise UnsupportedFeatureError(f"base model {self.spec.name!r} has no sampler to compare with its trainer")
        return await self.agreement.look_again(self._pair(self._present(), self.sampler))

    def _pair(self, workers: Workers, sampler: Sampler) -> Pair:
        return Pair(
            group=workers.group,
            trainer=workers.capabilities.trainer,
            sampler=sampler,
            revisions=self.revisions,
            handoff=self.handoff,
        )

    def count_tokens(self, data: tuple[Datum, ...]) -> int:
        """Tokens of a request's inputs; raises `UnsupportedFeatureError` for chunks that the trainer does not take."""
        count = self._trainer.count_tokens
        return sum(count(chunk) for datum in data for chunk in datum.model_input.chunks)

    def meter_sample(self, request: SampleInput, record: SamplerRecord, caller: Caller) -> Metered:
        """What a sample may use. A prompt that cannot be counted counts nothing: its future will say why."""
        try:
            prompt = sum(self._trainer.count_tokens(chunk) for chunk in request.prompt.chunks)
        except TinkerError:
            prompt = 0
        bounds = [] if request.sampling_params.max_tokens is None else [request.sampling_params.max_tokens]
        if self._workers is not None:  # else the workers still start, and nobody knows
            bounds.append(max(0, self._workers.capabilities.trainer.max_context_length - prompt))
        generated = min(bounds, default=0)
        return Metered(
            caller=caller,
            base_model=record.base_model,
            num_tokens=prompt,
            max_tokens=prompt + request.num_samples * generated,
            session_id=record.session_id,
            run_id=self.run_of(record),
            project_id=record.project_id,
        )

    @staticmethod
    def run_of(record: SamplerRecord) -> str | None:
        """The run whose weights a sampling session serves; None for a bare base model."""
        if record.model_path is not None:
            return TinkerPath.parse(record.model_path).run_id
        return record.revision.rpartition("@")[0] if record.revision is not None else None

    # --- requests -----------------------------------------------------------------------------------------------------

    def add_model(self, model_id: str, owner: str) -> None:
        """Open the queue of a new model; raises `CapacityError` or `WorkerLostError`, when the workers cannot start."""
        if self.state.startswith("failed"):
            raise WorkerLostError(f"base model {self.spec.name!r} is not available: {self.state}")
        if len(self.scheduler.model_ids()) >= self._config.max_models:
            raise CapacityError(
                f"all {self._config.max_models} models of this server are in use; finish a session, or raise "
                "--max-models"
            )
        self.scheduler.add_model(model_id, owner=owner)
        self.residence.add(model_id)

    def restore_model(self, row: ModelRow, owner: str) -> None:
        """Open the queue of a model that an earlier process left behind."""
        self.scheduler.add_model(row.model_id, owner=owner, next_seq_id=row.next_seq_id)
        self.residence.add(row.model_id, row)

    async def remove_model(self, model_id: str, *, keep_weights: bool = False) -> None:
        """Forget a model; what waits in its queue fails. Its published weights may stay for those who sample."""
        for request in self.scheduler.remove_model(model_id):
            self._resolve(request.request_id, describe_error(UnknownModelError(model_id)))
        await self.residence.remove(model_id, keep_weights=keep_weights)

    def submit(self, request: QueuedRequest) -> None:
        """Queue a request and wake the loop; raises `ModelLostError` for a model that cannot be brought back."""
        self.residence.require(request.model_id)
        self.scheduler.submit(request, self._clock.monotonic())
        self._wake.set()

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start workers and feed them, for ever; returns when they cannot be started at all."""
        try:
            await self._keep_running()
        finally:
            await self.agreement.close()
            await to_its_end(self._stop_sampler())

    async def _keep_running(self) -> None:
        failures = 0
        while True:
            try:
                await self._start()
                failures = 0
                await self._lose_workers(await self._serve_until_lost())
            except Exception as error:
                if not isinstance(error, TinkerError):
                    log.exception("base model %r failed", self.spec.name)
                failures += 1
                if not self._was_ready and not (isinstance(error, WorkerLostError) and failures < _FIRST_STARTS):
                    self._fail(error)
                    return
                await self._lose_workers(str(error))
            finally:
                await to_its_end(self._stop())  # no process may stay behind
            await self._pause(failures)

    async def _start(self) -> None:
        workers = await Workers.start(self.spec, self._config, self._plugins, self._own)
        self._workers = workers
        self.residence.attach(workers.group)
        if workers.sampler is not None and not (self._own is not None and self._was_ready):
            self.revisions.attach(workers.sampler)
        if self._own is not None and workers.sampler is not None and not self._was_ready:
            await self.agreement.pass_at_start(self._pair(workers, workers.sampler))
        if not self._own_started.done():
            self._own_started.set_result(None)
        self.state = "ready"
        self._was_ready = True
        if self._lost_at is not None:
            self.recovery_seconds = self._clock.monotonic() - self._lost_at
        self._lost_at = None
        log.info("base model %r is ready", self.spec.name)
        self._started.set_result(None)

    async def _finish_aside(self, *, cancel: bool = False) -> None:
        """Wait for the work beside the rest, which goes on without workers where it can."""
        if self._own is None:
            self.revisions.detach()
        tasks = list(self._aside)
        for task in tasks:
            if cancel:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pause(self, failures: int) -> None:
        """Wait longer and longer before workers are started that did not come up."""
        seconds = _RESTART_SECONDS[min(failures, len(_RESTART_SECONDS) - 1)]
        if seconds:
            log.error("base model %r: the workers are started again in %.0f seconds", self.spec.name, seconds)
            await self._clock.wait(asyncio.Event(), self._clock.monotonic() + seconds)

    async def _serve_until_lost(self) -> str:
        lost = asyncio.create_task(self.group.wait_lost())
        lost.add_done_callback(lambda _: self._wake.set())
        try:
            group = self.group
            await self._feed(group)
            return await lost if group.is_lost else "its workers did not answer"
        finally:
            lost.cancel()

    async def _feed(self, group: WorkerGroup) -> None:
        while not group.is_lost:
            self._wake.clear()
            try:
                await self.residence.tend()
            except WorkerLostError:
                return
            work = self.scheduler.next(self._clock.monotonic())
            self._log_skipped()
            if work is None:
                self._on_idle()
                await self._clock.wait(self._wake, _earlier(self.scheduler.deadline(), self.residence.deadline()))
                continue
            if not await self._run(work):
                return

    async def _run(self, work: Work) -> bool:
        """Run some work, or begin it; False when the workers were lost under it, and it has to run again."""
        self._running = work
        try:
            ready = await self.residence.prepare(work)
            if work.requests[0].seq_id > 0 and work.requests[0].request_type in _STORING:
                self._run_aside(work, ready)
                self._running = None
                return True
            await self._work_on(ready)
        except WorkerLostError as error:
            log.warning("base model %r: %s", self.spec.name, error)
            self.scheduler.finish(work, self._clock.monotonic())
            return False
        except BaseException:
            self.scheduler.finish(work, self._clock.monotonic())
            raise
        self.scheduler.finish(work, self._clock.monotonic())
        self._running = None
        return True

    async def _work_on(self, work: Work) -> None:
        await self._execute(self, work)
        await self.residence.finish_reverting(work)

    def _run_aside(self, work: Work, ready: Work) -> None:
        """Run work that mostly waits for a store: only its own model waits with it."""

        async def run() -> None:
            try:
                await self._work_on(ready)
            except WorkerLostError:
                self._unfinished += work.requests
            finally:
                self.scheduler.finish(work, self._clock.monotonic())

        def end(task: asyncio.Task[None]) -> None:
            del self._aside[task]
            self.residence.note_end()
            self._wake.set()
            if not task.cancelled() and task.exception() is not None:
                log.error("base model %r: work failed: %s", self.spec.name, work, exc_info=task.exception())

        self.scheduler.step_aside(work)
        task = asyncio.create_task(run())
        self._aside[task] = work
        task.add_done_callback(end)

    def _log_skipped(self) -> None:
        for gap in self.scheduler.take_skipped():
            log.warning(
                "model %s: seq_id %d to %d never arrived (%s); going on without",
                gap.model_id,
                gap.first_seq_id,
                gap.last_seq_id,
                "deadline passed" if gap.timed_out else "a later request proves it",
            )

    async def _lose_workers(self, reason: str) -> None:
        await self._finish_aside()
        self.state = "starting"
        if self._started.done():
            self._started = _new_future()
            self.num_restarts += 1
            self._lost_at = self._clock.monotonic()
            log.error("base model %r: %s; its models will be brought back", self.spec.name, reason)
        running, self._running = self._running, None
        unfinished, self._unfinished = self._unfinished, []
        self.residence.detach([*unfinished, *(running.requests if running is not None else ())])

    def _fail(self, error: Exception) -> None:
        """The workers cannot be started at all. What was accepted stays in the journal, for a server that can."""
        self.state = f"failed: {error}"
        log.error("base model %r cannot start: %s", self.spec.name, error)
        for started in (self._started, self._own_started):
            if not started.done():
                started.set_exception(error)
                started.exception()  # somebody may wait for it later, or nobody

    async def _stop(self) -> None:
        await self._finish_aside(cancel=True)
        workers, self._workers = self._workers, None
        if workers is None:
            return
        if self._own is None and workers.sampler is not None:
            await workers.sampler.close()
        await workers.group.close()

    async def _stop_sampler(self) -> None:
        """Stop a sampler beside the workers."""
        if self._own is not None:
            self.revisions.detach()
            await self._own.close()


def _new_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


def _own_sampler(spec: BaseModelSpec, config: EngineConfig, plugins: Plugins) -> OwnSampler | None:
    plugin = sampler_plugin(spec, config, plugins)
    return OwnSampler(plugin, spec, config) if plugin is not None and plugin.placement is Placement.OWN else None


def _earlier(first: float | None, second: float | None) -> float | None:
    return min((moment for moment in (first, second) if moment is not None), default=None)
