"""A plugin for worker ranks with a loss that raises in one of them, as one that runs out of memory does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import LossContext, LossPlugin

if TYPE_CHECKING:
    import torch

PLUGIN = "tests.megatron.failing_rank"
LOSS = "fails_in_rank_1"


def _fail(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise RuntimeError("this loss fails in rank 1")
    return -(context.input("weights") * logprobs).sum()


@hookimpl
def tinker_register_loss(register: Callable[[LossPlugin], None]) -> None:
    register(LossPlugin(name=LOSS, compute=_fail, optional_inputs=("weights",), per_token=False))
