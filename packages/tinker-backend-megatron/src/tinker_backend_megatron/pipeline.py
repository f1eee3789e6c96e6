"""Packed passes over a model whose layers lie on several ranks, with Megatron-Core's own pipeline schedules.

A schedule runs all micro-batches with gradient of a pass, forward and backward interleaved so that a stage keeps the
activations of no more micro-batches than there are stages from it to the last; those that only want logprobs follow in
a second one without backward.  What stages exchange has one shape, so that all micro-batches of a schedule are filled
up to the length of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import attrs
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from tinker_backend_megatron.context_parallel import ContextShare
from tinker_backend_megatron.packed import padded_length
from tinker_backend_megatron.root import MegatronRoot
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.training.logprobs import LossHead
from tinker_core.training.micro_batch import MicroBatch, PassLayout
from tinker_core.training.packing import Bin
from tinker_core.training.passes import PassTally

Outcome = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""What a schedule takes of a micro-batch: loss, number of tokens (of no interest here), and numbers to report."""


@attrs.frozen(kw_only=True, eq=False)
class PipelinePackedModel:
    """Implements `tinker_core.training.passes.PackedModel` for a model on several stages."""

    root: MegatronRoot
    world: MegatronWorld

    def run(self, layout: PassLayout, tally: PassTally) -> Generator[None, None, None]:
        """One schedule with gradient and one without, as far as there is something to do; yields after each."""
        wanting = [bins for bins in layout.passes if layout.needs_gradient(bins)]
        if wanting:
            self._schedule(layout, wanting, tally, forward_only=False)
            yield
        others = layout.passes[len(wanting) :]  # a layout has gradient first
        if others:
            self._schedule(layout, others, tally, forward_only=True)
            yield

    def _schedule(
        self, layout: PassLayout, passes: Sequence[Sequence[Bin]], tally: PassTally, *, forward_only: bool
    ) -> None:
        length = padded_length(layout, list(chain.from_iterable(passes)), self.world.topology)
        assert length is not None

        def step(coming: Iterator[Bin], root: MegatronRoot) -> tuple[torch.Tensor, Callable[[torch.Tensor], Outcome]]:
            batch = layout.micro_batch(next(coming), tally.gradients, self.world.device, length=length)
            share = ContextShare(batch, self.world.context_ranks)
            local = share.batch
            hidden = root.hidden_states(local.input_ids, local.position_ids, local.plan, local.segments)
            return hidden, partial(self._lose, batch, share, tally)

        with torch.set_grad_enabled(not forward_only), self.root.serving(layout.tenants(tally.gradients)):
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter([bins[self.world.data_rank] for bins in passes]),
                model=self.root,
                num_microbatches=len(passes),
                seq_length=length,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _lose(self, batch: MicroBatch, share: ContextShare, tally: PassTally, hidden_t1H: torch.Tensor) -> Outcome:
        """Run the head on the last stage; backward of the loss that it returns begins with the head's gradient."""
        assert self.root.unembed is not None
        head = LossHead(share.batch.head_data, batch.segments, num_owners=tally.losses.numel())
        hidden, result = head(self.root.whole_hidden(hidden_t1H), self.root.unembed)
        # Losses that fail leave a gradient of no use, which goes its way all the same: no stage waits in vain.
        tally.fail(result.failure)
        if self.world.reports:
            tally.add(batch.items, share.complete(result))
        loss: torch.Tensor = _KnownGradient.apply(hidden, result.grad_hidden)  # type: ignore[no-untyped-call]
        return loss, torch.zeros((), dtype=torch.int, device=hidden.device), {}


class _KnownGradient(torch.autograd.Function):
    """A loss of which only the gradient is known; its value, 0, means nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, grad_hidden: torch.Tensor | None) -> torch.Tensor:  # noqa: ANN401
        ctx.save_for_backward(torch.zeros_like(hidden) if grad_hidden is None else grad_hidden)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        # A schedule begins with 1: it divides no loss that comes with a number of tokens (calculate_per_token_loss).
        del grad_loss
        return ctx.saved_tensors[0], None
