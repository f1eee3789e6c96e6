"""A custom loss as a loss of the trainer, and the cells and inputs that it sees of a datum.

It stands for the path on which the client computes it: the loss runs once per datum on logprobs in the shape of
``target_tokens``, and its slopes weigh the logprobs as weights of ``cross_entropy`` would.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from tinker_core.custom_losses.check import metric_names
from tinker_core.interfaces import LossContext, LossPlugin
from tinker_core.training.cells import TARGETS, TargetCells
from tinker_core.training.graphs.program import Program
from tinker_core.types import CUSTOM_LOSS, CustomLoss, TensorData

_STORED = "stored cells"
"""Which cells of sparse targets exist; the others have logprob 0, as clients see them."""


def _key(name: str) -> str:
    """Inputs keep their own shape; the flat ones that the head works with are kept apart from them."""
    return f"input {name}"


def custom_cells(inputs: Mapping[str, TensorData], loss: CustomLoss) -> TargetCells:
    """Cells of a datum whose inputs were checked by `tinker_core.training.custom_validation`."""
    target = inputs[TARGETS]
    dense = target.to_numpy()
    found: dict[str, npt.NDArray[np.generic]] = {TARGETS: dense.reshape(-1), _key(TARGETS): dense}
    for entry in loss.inputs[1:]:
        found[_key(entry.name)] = _of_rank(inputs[entry.name].to_numpy(), entry.rank)
    reported = None
    if target.col_indices is not None:
        reported = target.row_indices() * target.shape[1] + target.col_indices
        found[_STORED] = np.isin(np.arange(dense.size), reported)
    per_position = target.shape[1] if len(target.shape) == 2 else 1
    positions = np.repeat(np.arange(target.shape[0], dtype=np.int64), per_position)
    return TargetCells(positions=positions, inputs=found, reported=reported)


def _of_rank(array: npt.NDArray[np.generic], rank: int) -> npt.NDArray[np.generic]:
    # A scalar travels without a shape, and arrives as one element.
    return array.reshape(()) if rank == 0 else array


def custom_loss_plugin(loss: CustomLoss) -> LossPlugin:
    """The loss of one request; raises `InvalidCustomLossError` for a graph that is not allowed."""
    graph = _GraphLoss(Program(loss))
    return LossPlugin(
        name=CUSTOM_LOSS,
        compute=graph.compute,
        evaluate=graph.evaluate,
        default_config={"loss_id": ""},
        soft_targets=True,
        per_token=False,
        reuses_logits=True,
        metrics=metric_names(loss),
    )


class _GraphLoss:
    def __init__(self, program: Program) -> None:
        self._program = program

    def compute(self, logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
        """The loss alone."""
        return self._run(_leaf(logprobs, context), context)

    def evaluate(self, logprobs: torch.Tensor, context: LossContext) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and its slopes, also for cells that sparse targets leave out."""
        with torch.enable_grad():
            leaf = _leaf(logprobs, context).requires_grad_()
            loss = self._run(leaf, context)
        try:
            (slopes,) = torch.autograd.grad(loss, leaf)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            raise self._program.error_in_backward(error) from error
        return loss.detach(), slopes.reshape(-1)

    def _run(self, leaf: torch.Tensor, context: LossContext) -> torch.Tensor:
        others = [context.input(_key(entry.name)) for entry in self._program.loss.inputs[1:]]
        loss, metrics = self._program.run([leaf, *others])
        for name, value in metrics.items():
            context.report(name, value)
        return loss


def _leaf(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    """Logprobs in the shape of the targets."""
    values = logprobs.detach()
    if context.has_input(_STORED):
        values = torch.where(context.input(_STORED), values, 0.0)
    return values.reshape(context.input(_key(TARGETS)).shape)
