"""One base model: its worker group, its queue, and the loop that feeds the one from the other."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinker_core.engine.clock import Clock
from tinker_core.engine.config import EngineConfig
from tinker_core.engine.group_sampler import GroupSampler
from tinker_core.engine.interruption import to_its_end
from tinker_core.engine.probe import probe_sampling, probe_training
from tinker_core.engine.revisions import Revisions
from tinker_core.engine.usage import Metered
from tinker_core.errors import (
    ConfigurationError,
    TinkerError,
    UnknownModelError,
    UnsupportedFeatureError,
    WorkerLostError,
)
from tinker_core.executors.protocol import GroupCapabilities
from tinker_core.executors.rank_loop import describe_error
from tinker_core.interfaces import Sampler, SamplerContext, SamplerPlugin, TrainerPlugin, WorkerGroup, WorkerGroupSpec
from tinker_core.plugins import Plugins
from tinker_core.scheduler import QueuedRequest, Scheduler, Work
from tinker_core.storage.checkpoints import safe_directory_name
from tinker_core.types import (
    BaseModelSpec,
    Caller,
    Datum,
    EngineOutput,
    Placement,
    SampleInput,
    SamplerRecord,
    TinkerPath,
    Transport,
)

log = logging.getLogger(__name__)

Execute = Callable[["BaseModel", Work], Any]
"""Async: runs one piece of work and resolves the futures of its requests."""
Resolve = Callable[[str, EngineOutput], None]


class BaseModel:
    """Starts and restarts the workers of a base model, and runs its requests in order.

    When a worker dies, its models are gone: their requests fail with `WorkerLostError`, and fresh workers start.
    """

    def __init__(
        self,
        spec: BaseModelSpec,
        config: EngineConfig,
        plugins: Plugins,
        clock: Clock,
        *,
        execute: Execute,
        resolve: Resolve,
    ) -> None:
        self.spec = spec
        self.scheduler = Scheduler(token_budget=config.pass_tokens)
        self.state = "starting"
        self._config = config
        self._plugins = plugins
        self._clock = clock
        self._execute = execute
        self._resolve = resolve
        self._trainer = self._trainer_plugin()
        self._wake = asyncio.Event()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._group: WorkerGroup | None = None
        self._capabilities: GroupCapabilities | None = None
        self._sampler: Sampler | None = None
        self._revisions: Revisions | None = None
        self.resident_models: set[str] = set()
        self._lost_models: dict[str, str] = {}
        """Why models that died with their workers are gone."""

    # --- what is there, once started ----------------------------------------------------------------------------------

    async def wait_started(self) -> None:
        """Return when the workers run; raises why they do not."""
        await asyncio.shield(self._started)

    @property
    def group(self) -> WorkerGroup:
        """The running workers."""
        if self._group is None:
            raise WorkerLostError(f"the workers of base model {self.spec.name!r} are not running: {self.state}")
        return self._group

    @property
    def capabilities(self) -> GroupCapabilities:
        """What the workers offer."""
        if self._capabilities is None:
            raise WorkerLostError(f"the workers of base model {self.spec.name!r} are not running: {self.state}")
        return self._capabilities

    @property
    def sampler(self) -> Sampler:
        """The sampler of this base model."""
        if self._sampler is None:
            raise self._no_sampler()
        return self._sampler

    @property
    def has_sampler(self) -> bool:
        """Whether a sampler is running."""
        return self._sampler is not None

    @property
    def revisions(self) -> Revisions:
        """The sampler's revisions."""
        if self._revisions is None:
            raise self._no_sampler()
        return self._revisions

    def _no_sampler(self) -> TinkerError:
        if self._config.sampler is None:
            return UnsupportedFeatureError("this server samples nothing; start it with --sampler")
        return WorkerLostError(f"the workers of base model {self.spec.name!r} are not running: {self.state}")

    @property
    def shares_process(self) -> bool:
        """Whether the sampler can copy live weights without any transport."""
        if self._sampler is None or self._capabilities is None:
            return False
        both = set(self._sampler.capabilities().transports) & set(self._capabilities.trainer.transports)
        return Transport.IN_PROCESS in both

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
        if self._capabilities is not None:  # else the workers still start, and nobody knows
            bounds.append(max(0, self._capabilities.trainer.max_context_length - prompt))
        generated = min(bounds, default=0)
        return Metered(
            caller=caller,
            base_model=record.base_model,
            num_tokens=prompt,
            max_tokens=prompt + request.num_samples * generated,
            session_id=record.session_id,
            run_id=_run_of(record),
            project_id=record.project_id,
        )

    # --- requests -----------------------------------------------------------------------------------------------------

    def add_model(self, model_id: str) -> None:
        """Open the queue of a new model; raises `WorkerLostError` when the workers could not be started."""
        if self.state.startswith("failed"):
            raise WorkerLostError(f"base model {self.spec.name!r} is not available: {self.state}")
        self.scheduler.add_model(model_id)

    def remove_model(self, model_id: str) -> None:
        """Close the queue of a model; what waits in it fails."""
        for request in self.scheduler.remove_model(model_id):
            self._resolve(request.request_id, describe_error(UnknownModelError(model_id)))
        self.resident_models.discard(model_id)

    def submit(self, request: QueuedRequest) -> None:
        """Queue a request and wake the loop; raises `WorkerLostError` for a model that died with its workers."""
        if request.model_id in self._lost_models:
            raise WorkerLostError(self._lost_models[request.model_id])
        self.scheduler.submit(request, self._clock.monotonic())
        self._wake.set()

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start workers and feed them, for ever; returns when they cannot be started at all."""
        while True:
            try:
                await self._start()
                self._lose_models(await self._serve_until_lost())
            except Exception as error:
                if not isinstance(error, TinkerError):
                    log.exception("base model %r failed", self.spec.name)
                self._fail(error)
                return
            finally:
                await to_its_end(self._stop())  # no process may stay behind

    async def _start(self) -> None:
        executors = self._plugins.executors()
        if self._config.executor not in executors:
            raise ConfigurationError(f"no plugin registers the executor {self._config.executor!r}")
        plugin = self._sampler_plugin()
        in_rank = plugin.name if plugin is not None and plugin.placement is Placement.WITH_TRAINER else None
        self._group = await executors[self._config.executor].start(self._group_spec(in_rank))
        assert self._group is not None
        self._capabilities = await self._group.call("capabilities")
        assert self._capabilities is not None
        self._sampler = await self._start_sampler(plugin, self._group, self._capabilities)
        if self.spec.trainable:
            await probe_training(self._group, self._capabilities)
        if self._sampler is not None:
            await probe_sampling(self._sampler)
            self._revisions = Revisions(self._sampler, await self._empty_spill_directory())
        self.state = "ready"
        log.info("base model %r is ready", self.spec.name)
        if not self._started.done():
            self._started.set_result(None)

    async def _empty_spill_directory(self) -> Path:
        """Spilled weights belong to revisions that ended with the process that made them."""
        directory = self._config.data_dir / "spill" / safe_directory_name(self.spec.name)
        if directory.exists():
            await asyncio.to_thread(shutil.rmtree, directory)
        return directory

    def _trainer_plugin(self) -> TrainerPlugin:
        trainers = self._plugins.trainers()
        if self._config.backend not in trainers:
            known = ", ".join(sorted(trainers)) or "none"
            raise ConfigurationError(f"no plugin registers the backend {self._config.backend!r}; known: {known}")
        return trainers[self._config.backend]

    def _sampler_plugin(self) -> SamplerPlugin | None:
        if self._config.sampler is None or not self.spec.sampleable:
            return None
        samplers = self._plugins.samplers()
        if self._config.sampler not in samplers:
            known = ", ".join(sorted(samplers)) or "none"
            raise ConfigurationError(f"no plugin registers the sampler {self._config.sampler!r}; known: {known}")
        return samplers[self._config.sampler]

    async def _start_sampler(
        self, plugin: SamplerPlugin | None, group: WorkerGroup, capabilities: GroupCapabilities
    ) -> Sampler | None:
        if plugin is None:
            return None
        if plugin.placement is Placement.WITH_TRAINER:
            assert capabilities.sampler is not None
            return GroupSampler(group, capabilities.sampler)
        if plugin.build is None:
            raise ConfigurationError(f"sampler {plugin.name!r} registers no builder for placement {plugin.placement}")
        sampler = plugin.build(
            SamplerContext(
                base_model=self.spec,
                device=self._config.device,
                dtype=self._config.dtype,
                directory=str(self._config.data_dir / "sampler"),
                max_revisions=self._config.max_revisions,
                options=self._config.options,
            )
        )
        await sampler.start()
        return sampler

    def _group_spec(self, sampler: str | None) -> WorkerGroupSpec:
        config = self._config
        return WorkerGroupSpec(
            base_model=self.spec,
            trainer=config.backend,
            sampler=sampler,
            plugins=config.plugins,
            num_ranks=config.num_ranks,
            device=config.device,
            dtype=config.dtype,
            micro_batch_tokens=config.micro_batch_tokens,
            max_models=config.max_models,
            max_lora_rank=config.max_lora_rank,
            max_context_length=config.max_context_length,
            max_revisions=config.max_revisions,
            max_decode_batch=config.max_decode_batch,
            options=dict(config.options),
            environment=dict(config.worker_environment),
        )

    async def _serve_until_lost(self) -> str:
        lost = asyncio.create_task(self.group.wait_lost())
        lost.add_done_callback(lambda _: self._wake.set())
        try:
            await self._feed(self.group)
            return await lost
        finally:
            lost.cancel()

    async def _feed(self, group: WorkerGroup) -> None:
        while not group.is_lost:
            self._wake.clear()
            work = self.scheduler.next(self._clock.monotonic())
            self._log_skipped()
            if work is None:
                await self._clock.wait(self._wake, self.scheduler.deadline())
                continue
            try:
                await self._execute(self, work)
            finally:
                self.scheduler.finish(work, self._clock.monotonic())

    def _log_skipped(self) -> None:
        for gap in self.scheduler.take_skipped():
            log.warning(
                "model %s: seq_id %d to %d never arrived (%s); going on without",
                gap.model_id,
                gap.first_seq_id,
                gap.last_seq_id,
                "deadline passed" if gap.timed_out else "a later request proves it",
            )

    def _lose_models(self, reason: str) -> None:
        self.state = "starting"
        for model_id in self.resident_models:
            message = f"{reason}; its models are gone, load a saved checkpoint into a new one"
            self._lost_models[model_id] = message
            for request in self.scheduler.remove_model(model_id):
                self._resolve(request.request_id, describe_error(WorkerLostError(message)))
        self.resident_models.clear()

    def _fail(self, error: Exception) -> None:
        self.state = f"failed: {error}"
        log.error("base model %r cannot start: %s", self.spec.name, error)
        if not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # somebody may wait for it later, or nobody
        for model_id in self.scheduler.model_ids():
            for request in self.scheduler.remove_model(model_id):
                self._resolve(request.request_id, describe_error(WorkerLostError(f"{self.spec.name!r}: {error}")))

    async def _stop(self) -> None:
        sampler, self._sampler, self._revisions = self._sampler, None, None
        group, self._group = self._group, None
        if sampler is not None:
            await sampler.close()
        if group is not None:
            await group.close()


def _run_of(record: SamplerRecord) -> str | None:
    """The run whose weights a sampling session serves; None for a bare base model."""
    if record.model_path is not None:
        return TinkerPath.parse(record.model_path).run_id
    return record.revision.rpartition("@")[0] if record.revision is not None else None
