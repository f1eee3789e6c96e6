"""What comes with tinker-core: local executor, colocated sampler, built-in losses and AdamW. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import SamplerPlugin
from tinker_core.types import Placement

if TYPE_CHECKING:
    from tinker_core.interfaces import (
        ExecutorPlugin,
        LossPlugin,
        ModelHandle,
        OptimizerPlugin,
        RankContext,
        RankSampler,
    )


@hookimpl
def tinker_register_executor(register: Callable[[ExecutorPlugin], None]) -> None:
    """Register ``local``: spawned processes on this machine."""
    from tinker_core.executors.local import LOCAL_EXECUTOR

    register(LOCAL_EXECUTOR)


def _build_colocated(context: RankContext, handle: ModelHandle) -> RankSampler:
    from tinker_core.sampling.colocated import build_sampler

    return build_sampler(context, handle)


@hookimpl
def tinker_register_sampler(register: Callable[[SamplerPlugin], None]) -> None:
    """Register ``colocated``: decodes inside the ranks of any trainer that offers a handle, on its base weights."""
    register(SamplerPlugin(name="colocated", placement=Placement.WITH_TRAINER, build_in_rank=_build_colocated))


@hookimpl
def tinker_register_loss(register: Callable[[LossPlugin], None]) -> None:
    """Register the losses of the Tinker API. Called in trainer ranks only: it imports torch."""
    from tinker_core.training.losses import BUILT_IN_LOSSES

    for loss in BUILT_IN_LOSSES:
        register(loss)


@hookimpl
def tinker_register_optimizer(register: Callable[[OptimizerPlugin], None]) -> None:
    """Register AdamW. Called in trainer ranks only: it imports torch."""
    from tinker_core.training.optimizer import ADAMW

    register(ADAMW)
