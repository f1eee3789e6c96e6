"""Starting what a base model runs on: its worker group and its sampler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import attrs

from tinker_core.engine.config import EngineConfig
from tinker_core.engine.group_sampler import GroupSampler
from tinker_core.engine.interruption import to_its_end
from tinker_core.engine.no_trainer import NoTrainer
from tinker_core.engine.own_sampler import OwnSampler
from tinker_core.engine.probe import probe_sampling, probe_training
from tinker_core.errors import ConfigurationError
from tinker_core.executors.protocol import GroupCapabilities
from tinker_core.interfaces import Sampler, SamplerPlugin, TrainerPlugin, WorkerGroup, WorkerGroupSpec
from tinker_core.plugins import Plugins
from tinker_core.types import BaseModelSpec, Placement


def trainer_plugin(config: EngineConfig, plugins: Plugins) -> TrainerPlugin:
    """The chosen trainer; raises `ConfigurationError`."""
    trainers = plugins.trainers()
    if config.backend not in trainers:
        known = ", ".join(sorted(trainers)) or "none"
        raise ConfigurationError(f"no plugin registers the backend {config.backend!r}; known: {known}")
    return trainers[config.backend]


def sampler_plugin(spec: BaseModelSpec, config: EngineConfig, plugins: Plugins) -> SamplerPlugin | None:
    """The chosen sampler, if this base model has one; raises `ConfigurationError`."""
    if config.sampler is None or not spec.sampleable:
        return None
    samplers = plugins.samplers()
    if config.sampler not in samplers:
        known = ", ".join(sorted(samplers)) or "none"
        raise ConfigurationError(f"no plugin registers the sampler {config.sampler!r}; known: {known}")
    return samplers[config.sampler]


def choose_ranks(config: EngineConfig, plugins: Plugins) -> int:
    """The worker processes of each base model; raises `ConfigurationError`."""
    plugin = trainer_plugin(config, plugins)
    return config.num_ranks if plugin.choose_ranks is None else plugin.choose_ranks(config.num_ranks, config.options)


def check_plugins(config: EngineConfig, plugins: Plugins) -> None:
    """Ask trainer and sampler, before anything is started, whether they could start; raises `ConfigurationError`."""
    choose_ranks(config, plugins)
    trainer = trainer_plugin(config, plugins)
    for spec in config.base_models:
        plugin = sampler_plugin(spec, config, plugins)
        if plugin is None:
            continue
        if plugin.placement is Placement.WITH_TRAINER and trainer.check_handle is not None:
            trainer.check_handle(config.options)
        if plugin.check is not None:
            plugin.check(spec, config.device, config.options)


@attrs.define(kw_only=True, eq=False)
class Workers:
    """The running workers of one base model, proved to train and to sample."""

    group: WorkerGroup
    capabilities: GroupCapabilities
    sampler: Sampler | None = None
    """In the workers, or beside them."""

    @classmethod
    async def start(
        cls, spec: BaseModelSpec, config: EngineConfig, plugins: Plugins, own: OwnSampler | None = None
    ) -> Self:
        """Start the workers, and a sampler beside them unless it runs already.

        Raises the reason why something does not start, and then no worker runs.
        """
        executors = plugins.executors()
        if config.executor not in executors:
            raise ConfigurationError(f"no plugin registers the executor {config.executor!r}")
        plugin = sampler_plugin(spec, config, plugins)
        in_rank = plugin.name if plugin is not None and own is None else None
        was_there = own is not None and own.sampler is not None
        async with _starting(own, config) as beside:
            group: WorkerGroup
            if beside is not None and not spec.trainable:
                group = NoTrainer(spec, (await beside).capabilities())
            else:
                group = await executors[config.executor].start(_group_spec(spec, config, in_rank, plugins))
            try:
                workers = cls(group=group, capabilities=await group.call("capabilities"))
                if in_rank is not None:
                    assert workers.capabilities.sampler is not None
                    workers.sampler = GroupSampler(group, workers.capabilities.sampler)
                if spec.trainable:
                    await probe_training(group, workers.capabilities)
                if beside is not None:
                    workers.sampler = await beside
                if workers.sampler is not None and not was_there:
                    await probe_sampling(workers.sampler)
            except BaseException:
                await to_its_end(group.close())  # no process may stay behind
                raise
        return workers


@asynccontextmanager
async def _starting(own: OwnSampler | None, config: EngineConfig) -> AsyncIterator[asyncio.Task[Sampler] | None]:
    """The start of a sampler beside the workers, given up when the block fails."""
    if own is None:
        yield None
        return
    task = asyncio.create_task(own.start())
    try:
        if config.device != "cpu":
            # Engines measure what is free on a GPU to know what they may take; nobody else may take some meanwhile.
            await asyncio.wait([task])
            task.result()
        yield task
    finally:
        if not task.done():
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _group_spec(spec: BaseModelSpec, config: EngineConfig, sampler: str | None, plugins: Plugins) -> WorkerGroupSpec:
    return WorkerGroupSpec(
        base_model=spec,
        trainer=config.backend,
        sampler=sampler,
        plugins=config.plugins,
        num_ranks=choose_ranks(config, plugins),
        device=config.device,
        dtype=config.dtype,
        micro_batch_tokens=config.micro_batch_tokens,
        max_models=config.max_resident + 1,  # and the one that trainer and sampler are compared with
        max_lora_rank=config.max_lora_rank,
        max_context_length=config.max_context_length,
        max_revisions=config.max_revisions,
        max_decode_batch=config.max_decode_batch,
        deterministic=config.deterministic,
        options=dict(config.options),
        environment=dict(config.worker_environment),
    )
