"""A Megatron-Core model under packed passes."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import attrs
import torch

from tinker_backend_megatron.context_parallel import ContextShare
from tinker_backend_megatron.root import MegatronRoot
from tinker_backend_megatron.topology import Topology
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.training.logprobs import LossHead
from tinker_core.training.micro_batch import PassLayout
from tinker_core.training.packing import Bin
from tinker_core.training.passes import PassTally


@attrs.frozen(kw_only=True, eq=False)
class MegatronPackedModel:
    """Implements `tinker_core.training.passes.PackedModel` for a model on one stage."""

    root: MegatronRoot
    world: MegatronWorld

    def run(self, layout: PassLayout, tally: PassTally) -> Generator[None, None, None]:
        """Forward, loss and backward of each micro-batch."""
        for bins in layout.passes:
            self._micro_pass(layout, bins, tally)
            if tally.failure is not None and self.world.size == 1:
                return
            yield

    def _micro_pass(self, layout: PassLayout, bins: Sequence[Bin], tally: PassTally) -> None:
        length = padded_length(layout, bins, self.world.topology)
        batch = layout.micro_batch(bins[self.world.data_rank], tally.gradients, self.world.device, length=length)
        share = ContextShare(batch, self.world.context_ranks)
        local = share.batch
        head = LossHead(local.head_data, batch.segments, num_owners=len(layout.requests))
        with_gradient = layout.needs_gradient(bins)
        with torch.set_grad_enabled(with_gradient), self.root.serving(layout.tenants(tally.gradients)):
            hidden, result = self.root(local.input_ids, local.position_ids, local.plan, local.segments, head)
        if with_gradient:
            grad_hidden = torch.zeros_like(hidden) if result.grad_hidden is None else result.grad_hidden
            torch.autograd.backward(hidden, grad_hidden)
        tally.fail(result.failure)
        if self.world.reports:
            tally.add(batch.items, share.complete(result))


def padded_length(layout: PassLayout, bins: Sequence[Bin], topology: Topology) -> int | None:
    """Tokens that each of some micro-batches has in all ranks; None where each may have its own."""
    divisor = topology.token_divisor
    if divisor == 1 and topology.pipeline == 1 and topology.expert == 1:
        return None
    longest = max(layout.length(one) for one in bins)
    return -(-longest // divisor) * divisor
