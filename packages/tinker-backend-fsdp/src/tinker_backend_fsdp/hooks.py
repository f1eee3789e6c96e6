"""Registers the trainer ``fsdp``. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import TrainerPlugin

if TYPE_CHECKING:
    from tinker_core.interfaces import RankContext, Trainer, TrainerParts


def _build_trainer(context: RankContext, parts: TrainerParts) -> Trainer:
    from tinker_backend_fsdp.trainer import FsdpTrainer

    return FsdpTrainer(context, parts)


@hookimpl
def tinker_register_trainer(register: Callable[[TrainerPlugin], None]) -> None:
    """Register ``fsdp``: a Hugging Face causal LM, sharded with FSDP2."""
    register(TrainerPlugin(name="fsdp", build=_build_trainer))
