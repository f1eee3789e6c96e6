"""A plugin for worker ranks with a loss that reports what its process has made of CUDA; it is otherwise constant."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import LossContext, LossPlugin

if TYPE_CHECKING:
    import torch

PLUGIN = "tests.megatron.loaded_modules"
LOSS = "reports_the_shim"
LOADED, CUDA_IS_AS_IT_WAS = "shim_loaded:mean", "cuda_is_as_it_was:mean"


def _report(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    import torch.cuda

    context.report(LOADED, float("tinker_backend_megatron.cpu_shim" in sys.modules))
    context.report(CUDA_IS_AS_IT_WAS, float(torch.cuda.current_device.__module__ == torch.cuda.__name__))
    return (logprobs * 0.0).sum()


@hookimpl
def tinker_register_loss(register: Callable[[LossPlugin], None]) -> None:
    metrics = (LOADED, CUDA_IS_AS_IT_WAS)
    register(LossPlugin(name=LOSS, compute=_report, optional_inputs=("weights",), per_token=False, metrics=metrics))
