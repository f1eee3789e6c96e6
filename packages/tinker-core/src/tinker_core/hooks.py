"""The plugins that come with tinker-core: the local executor, the built-in losses and AdamW. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinker_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from tinker_core.interfaces import ExecutorPlugin, LossPlugin, OptimizerPlugin


@hookimpl
def tinker_register_executor(register: Callable[[ExecutorPlugin], None]) -> None:
    """Register ``local``: spawned processes on this machine."""
    from tinker_core.executors.local import LOCAL_EXECUTOR

    register(LOCAL_EXECUTOR)


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
