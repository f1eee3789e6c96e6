"""Make the trainer and the sampler of a rank from a worker group's spec."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TypeVar

from tinker_core.errors import ConfigurationError, PluginError
from tinker_core.interfaces import RankContext, RankSampler, Trainer, TrainerParts, WorkerGroupSpec
from tinker_core.plugins import Plugins
from tinker_core.types import Placement

_V = TypeVar("_V")


class LazyMapping(Mapping[str, _V]):
    """A mapping that is made when it is first read, so that a trainer without torch never imports torch losses."""

    def __init__(self, make: Callable[[], Mapping[str, _V]]) -> None:
        self._make = make

    @cached_property
    def _items(self) -> Mapping[str, _V]:
        return self._make()

    def __getitem__(self, key: str) -> _V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def rank_context(spec: WorkerGroupSpec, rank: int, rendezvous: str) -> RankContext:
    """What one rank of a group is told."""
    return RankContext(
        base_model=spec.base_model,
        rank=rank,
        world_size=spec.num_ranks,
        rendezvous=rendezvous,
        device=spec.device,
        dtype=spec.dtype,
        micro_batch_tokens=spec.micro_batch_tokens,
        max_models=spec.max_models,
        max_lora_rank=spec.max_lora_rank,
        max_context_length=spec.max_context_length,
        max_revisions=spec.max_revisions,
        max_decode_batch=spec.max_decode_batch,
        deterministic=spec.deterministic,
        options=dict(spec.options),
    )


def build_rank(spec: WorkerGroupSpec, context: RankContext) -> tuple[Trainer, RankSampler | None]:
    """Load the plugins and build; raises `PluginError` or `ConfigurationError` with the fix."""
    plugins = Plugins.load(*spec.plugins)
    trainers = plugins.trainers()
    if spec.trainer not in trainers:
        raise PluginError(f"no plugin registers the backend {spec.trainer!r}; known: {', '.join(sorted(trainers))}")
    parts = TrainerParts(losses=LazyMapping(plugins.losses), optimizers=LazyMapping(plugins.optimizers))
    trainer = trainers[spec.trainer].build(context, parts)
    return trainer, _build_sampler(plugins, spec, context, trainer)


def _build_sampler(
    plugins: Plugins, spec: WorkerGroupSpec, context: RankContext, trainer: Trainer
) -> RankSampler | None:
    if spec.sampler is None:
        return None
    samplers = plugins.samplers()
    if spec.sampler not in samplers:
        raise PluginError(f"no plugin registers the sampler {spec.sampler!r}; known: {', '.join(sorted(samplers))}")
    plugin = samplers[spec.sampler]
    handle = trainer.model_handle()
    if plugin.placement is not Placement.WITH_TRAINER or plugin.build_in_rank is None or handle is None:
        raise ConfigurationError(
            f"sampler {spec.sampler!r} cannot run inside backend {spec.trainer!r}; "
            "choose a sampler with processes of its own"
        )
    return plugin.build_in_rank(context, handle)
