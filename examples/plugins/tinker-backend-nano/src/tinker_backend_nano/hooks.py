"""Registers the trainer ``nano``. The server imports this module, so it stays free of torch."""

from __future__ import annotations

from collections.abc import Callable

from tinker_core import hookimpl
from tinker_core.interfaces import RankContext, Trainer, TrainerParts, TrainerPlugin


def build(context: RankContext, parts: TrainerParts) -> Trainer:
    """Runs in the worker processes only."""
    from tinker_backend_nano.trainer import NanoTrainer

    return NanoTrainer(context, parts)


@hookimpl
def tinker_register_trainer(register: Callable[[TrainerPlugin], None]) -> None:
    """Makes ``--backend nano`` known."""
    register(TrainerPlugin(name="nano", build=build))
