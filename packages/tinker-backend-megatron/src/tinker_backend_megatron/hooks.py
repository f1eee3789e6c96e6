"""Registers the trainer ``megatron``. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinker_backend_megatron.bridges import WEIGHTS_BRIDGE
from tinker_backend_megatron.full.option import FULL_PARAMETER
from tinker_backend_megatron.te_option import TRANSFORMER_ENGINE
from tinker_backend_megatron.topology import TOPOLOGY_OPTIONS, check_handle, choose_ranks
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import TrainerPlugin

if TYPE_CHECKING:
    from tinker_core.interfaces import RankContext, Trainer, TrainerParts


def _build_trainer(context: RankContext, parts: TrainerParts) -> Trainer:
    from tinker_backend_megatron.quiet import import_megatron_core

    import_megatron_core()
    from tinker_backend_megatron.trainer import MegatronTrainer

    return MegatronTrainer(context, parts)


@hookimpl
def tinker_register_trainer(register: Callable[[TrainerPlugin], None]) -> None:
    """Register ``megatron``: a Hugging Face causal LM on Megatron-Core."""
    register(
        TrainerPlugin(
            name="megatron",
            build=_build_trainer,
            options=(*TOPOLOGY_OPTIONS, FULL_PARAMETER, TRANSFORMER_ENGINE, WEIGHTS_BRIDGE),
            choose_ranks=choose_ranks,
            check_handle=check_handle,
        )
    )
