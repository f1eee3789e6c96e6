"""Starting and stopping what a base model runs on: its worker group and its sampler."""

from __future__ import annotations

from typing import Self

import attrs

from tinker_core.engine.config import EngineConfig
from tinker_core.engine.group_sampler import GroupSampler
from tinker_core.engine.interruption import to_its_end
from tinker_core.engine.probe import probe_sampling, probe_training
from tinker_core.errors import ConfigurationError
from tinker_core.executors.protocol import GroupCapabilities
from tinker_core.interfaces import Sampler, SamplerContext, SamplerPlugin, TrainerPlugin, WorkerGroup, WorkerGroupSpec
from tinker_core.plugins import Plugins
from tinker_core.types import BaseModelSpec, Placement


def trainer_plugin(config: EngineConfig, plugins: Plugins) -> TrainerPlugin:
    """The chosen trainer; raises `ConfigurationError`."""
    trainers = plugins.trainers()
    if config.backend not in trainers:
        known = ", ".join(sorted(trainers)) or "none"
        raise ConfigurationError(f"no plugin registers the backend {config.backend!r}; known: {known}")
    return trainers[config.backend]


def _sampler_plugin(spec: BaseModelSpec, config: EngineConfig, plugins: Plugins) -> SamplerPlugin | None:
    if config.sampler is None or not spec.sampleable:
        return None
    samplers = plugins.samplers()
    if config.sampler not in samplers:
        known = ", ".join(sorted(samplers)) or "none"
        raise ConfigurationError(f"no plugin registers the sampler {config.sampler!r}; known: {known}")
    return samplers[config.sampler]


@attrs.define(kw_only=True, eq=False)
class Workers:
    """The running workers of one base model, proved to train and to sample."""

    group: WorkerGroup
    capabilities: GroupCapabilities
    sampler: Sampler | None = None

    @classmethod
    async def start(cls, spec: BaseModelSpec, config: EngineConfig, plugins: Plugins) -> Self:
        """Start everything; raises the reason why something does not, and then nothing runs."""
        executors = plugins.executors()
        if config.executor not in executors:
            raise ConfigurationError(f"no plugin registers the executor {config.executor!r}")
        plugin = _sampler_plugin(spec, config, plugins)
        in_rank = plugin.name if plugin is not None and plugin.placement is Placement.WITH_TRAINER else None
        group: WorkerGroup = await executors[config.executor].start(_group_spec(spec, config, in_rank))
        workers: Self | None = None
        try:
            workers = cls(group=group, capabilities=await group.call("capabilities"))
            await workers.start_sampler(plugin, spec, config)
            if spec.trainable:
                await probe_training(group, workers.capabilities)
            if workers.sampler is not None:
                await probe_sampling(workers.sampler)
        except BaseException:
            await to_its_end(group.close() if workers is None else workers.stop())  # no process may stay behind
            raise
        return workers

    async def start_sampler(self, plugin: SamplerPlugin | None, spec: BaseModelSpec, config: EngineConfig) -> None:
        """Start the sampler, if there is one, in the ranks or beside them."""
        if plugin is None:
            return
        if plugin.placement is Placement.WITH_TRAINER:
            assert self.capabilities.sampler is not None
            self.sampler = GroupSampler(self.group, self.capabilities.sampler)
            return
        if plugin.build is None:
            raise ConfigurationError(f"sampler {plugin.name!r} registers no builder for placement {plugin.placement}")
        context = SamplerContext(
            base_model=spec,
            device=config.device,
            dtype=config.dtype,
            directory=str(config.data_dir / "sampler"),
            max_revisions=config.max_revisions,
            options=config.options,
        )
        self.sampler = plugin.build(context)
        await self.sampler.start()

    async def stop(self) -> None:
        """Stop everything."""
        if self.sampler is not None:
            await self.sampler.close()
        await self.group.close()


def _group_spec(spec: BaseModelSpec, config: EngineConfig, sampler: str | None) -> WorkerGroupSpec:
    return WorkerGroupSpec(
        base_model=spec,
        trainer=config.backend,
        sampler=sampler,
        plugins=config.plugins,
        num_ranks=config.num_ranks,
        device=config.device,
        dtype=config.dtype,
        micro_batch_tokens=config.micro_batch_tokens,
        max_models=config.max_resident,
        max_lora_rank=config.max_lora_rank,
        max_context_length=config.max_context_length,
        max_revisions=config.max_revisions,
        max_decode_batch=config.max_decode_batch,
        deterministic=config.deterministic,
        options=dict(config.options),
        environment=dict(config.worker_environment),
    )
