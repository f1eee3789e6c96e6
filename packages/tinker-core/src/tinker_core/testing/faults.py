"""A plugin with losses that break on purpose. Load it in worker ranks by its module name; imports no torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import LossContext, LossPlugin

if TYPE_CHECKING:
    import torch

FAULTS_PLUGIN = "tinker_core.testing.faults"
"""The module name under which `Plugins.load` finds the faults."""

FAILING_LOSS = "fails_in_backward"
"""Computes a fine value and raises as soon as its gradient is asked for."""


def _fails_in_backward(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    del context

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("this loss fails in backward")

    value = -(logprobs * 1.0)
    if value.requires_grad:
        value.register_hook(fail)  # type: ignore[no-untyped-call]
    return value.sum()


@hookimpl
def tinker_register_loss(register: Callable[[LossPlugin], None]) -> None:
    """Register the loss `FAILING_LOSS`."""
    register(LossPlugin(name=FAILING_LOSS, compute=_fails_in_backward, optional_inputs=("weights",)))
