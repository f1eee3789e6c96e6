"""A sharded Hugging Face model under packed passes: one micro-batch per rank at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import attrs
import torch

from tinker_backend_fsdp.root import CausalRoot
from tinker_core.training.logprobs import HeadResult, LossHead
from tinker_core.training.micro_batch import MicroBatch, PassLayout
from tinker_core.training.packing import Bin
from tinker_core.training.passes import PassTally
from tinker_core.training.world import World


@attrs.frozen(kw_only=True, eq=False)
class FsdpPackedModel:
    """Implements `tinker_core.training.passes.PackedModel`."""

    root: CausalRoot
    world: World

    def run(self, layout: PassLayout, tally: PassTally) -> Generator[None, None, None]:
        """Forward, loss and backward of each micro-batch."""
        for bins in layout.passes:
            self._micro_pass(layout, bins, tally)
            if tally.failure is not None and self.world.size == 1:
                return
            yield

    def _micro_pass(self, layout: PassLayout, bins: Sequence[Bin], tally: PassTally) -> None:
        batch = layout.micro_batch(bins[self.world.rank], tally.gradients, self.world.device)
        head = LossHead(batch.head_data, batch.segments, num_owners=len(layout.requests))
        with_gradient = layout.needs_gradient(bins)
        with torch.set_grad_enabled(with_gradient):
            hidden, result = self._forward(batch, head)
        if with_gradient:
            grad_hidden = torch.zeros_like(hidden) if result.grad_hidden is None else result.grad_hidden
            torch.autograd.backward(hidden, grad_hidden)
        tally.fail(result.failure)
        tally.add(batch.items, result)

    def _forward(self, batch: MicroBatch, head: LossHead) -> tuple[torch.Tensor, HeadResult]:
        outcome: tuple[torch.Tensor, HeadResult] = self.root(
            batch.input_ids, batch.position_ids, batch.plan, batch.segments, head
        )
        return outcome
