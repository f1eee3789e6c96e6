"""Registers the trainer ``fsdp`` and the sampler ``colocated``. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import SamplerPlugin, TrainerPlugin
from tinker_core.types import Placement

if TYPE_CHECKING:
    from tinker_core.interfaces import ModelHandle, RankContext, RankSampler, Trainer, TrainerParts


def _build_trainer(context: RankContext, parts: TrainerParts) -> Trainer:
    from tinker_backend_fsdp.trainer import FsdpTrainer

    return FsdpTrainer(context, parts)


def _build_sampler(context: RankContext, handle: ModelHandle) -> RankSampler:
    from tinker_backend_fsdp.sampler import build_sampler

    return build_sampler(context, handle)


@hookimpl
def tinker_register_trainer(register: Callable[[TrainerPlugin], None]) -> None:
    """Register ``fsdp``: a Hugging Face causal LM, sharded with FSDP2."""
    register(TrainerPlugin(name="fsdp", build=_build_trainer))


@hookimpl
def tinker_register_sampler(register: Callable[[SamplerPlugin], None]) -> None:
    """Register ``colocated``: decodes inside the trainer's ranks, on its base weights."""
    register(SamplerPlugin(name="colocated", placement=Placement.WITH_TRAINER, build_in_rank=_build_sampler))
