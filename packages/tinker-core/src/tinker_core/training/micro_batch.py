"""From requests to packed micro-batches: which tokens go where, and how the head finds their targets."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from tinker_core.interfaces import LossPlugin
from tinker_core.training.adapters import AdapterGradient, Segment
from tinker_core.training.attention import PackedPlan
from tinker_core.training.cells import TARGETS, TargetCells, target_cells
from tinker_core.training.graphs.loss import custom_cells
from tinker_core.training.logprobs import HeadDatum
from tinker_core.training.packing import Bin, pack
from tinker_core.training.state import ModelState
from tinker_core.training.validation import effective_config, loss_inputs
from tinker_core.types import CUSTOM_LOSS, Datum, PreparedModelPass, TensorData


@attrs.frozen(kw_only=True, eq=False)
class PassRequest:
    """A request that passed validation, with the model and the loss it names."""

    request: PreparedModelPass
    state: ModelState
    loss: LossPlugin

    def cells(self, datum: Datum) -> TargetCells:
        """What the request's loss looks at."""
        custom_loss = self.request.custom_loss
        if self.loss.name == CUSTOM_LOSS and custom_loss is not None:
            return custom_cells(datum.loss_fn_inputs, custom_loss)
        return target_cells(loss_inputs(datum, self.loss))


@attrs.frozen(kw_only=True, eq=False)
class PackItem:
    """One datum of a pass."""

    owner: int
    """Index of its request in the pass."""
    tokens: np.ndarray[tuple[int, ...], np.dtype[np.int32]]
    cells: TargetCells
    target: TensorData
    offset: int
    """Where its reported logprobs lie among those of the whole pass."""

    @property
    def num_reported(self) -> int:
        """Logprobs that go back to the client."""
        return int(self.target.data.size)


@attrs.frozen(kw_only=True, eq=False)
class MicroBatch:
    """Input of one rank in one micro-pass."""

    input_ids: torch.Tensor
    """int64 ``[1, T]``."""
    position_ids: torch.Tensor
    """int64 ``[1, T]``, from 0 in every sequence."""
    plan: PackedPlan
    segments: tuple[Segment, ...]
    head_data: tuple[HeadDatum, ...]
    items: tuple[PackItem, ...]


class PassLayout:
    """All data of a pass, packed into micro-batches. Equal in all ranks."""

    def __init__(self, requests: Sequence[PassRequest], *, budget: int, num_ranks: int) -> None:
        self.requests = requests
        # Gradient first, so that at most one micro-pass mixes; the rest then runs without keeping activations.
        order = sorted(range(len(requests)), key=lambda index: requests[index].request.forward_only)
        items: list[PackItem] = []
        offset = 0
        for owner in order:
            for datum in requests[owner].request.data:
                item = PackItem(
                    owner=owner,
                    tokens=datum.model_input.text_tokens(),
                    cells=requests[owner].cells(datum),
                    target=datum.loss_fn_inputs[TARGETS],
                    offset=offset,
                )
                offset += item.num_reported
                items.append(item)
        self.items = tuple(items)
        self.num_reported = offset
        self._bins = pack([item.tokens.size for item in items], budget=budget, num_ranks=num_ranks)

    @property
    def passes(self) -> list[list[Bin]]:
        """Micro-batches as ``[pass][rank]``."""
        return self._bins

    def needs_gradient(self, bins: Sequence[Bin]) -> bool:
        """Whether any rank computes a gradient in a micro-pass; then all of them run backward."""
        return any(not self.requests[self.items[index].owner].request.forward_only for one in bins for index in one)

    def length(self, bin_: Bin) -> int:
        """Tokens of a micro-batch; without items there is one all the same."""
        return max(1, sum(self.items[index].tokens.size for index in bin_))

    def micro_batch(
        self,
        bin_: Bin,
        gradients: Sequence[AdapterGradient | None],
        device: torch.device,
        *,
        length: int | None = None,
    ) -> MicroBatch:
        """The input of one rank, filled up to ``length`` with tokens that add nothing.

        A bin without items becomes one such token.
        """
        items = tuple(self.items[index] for index in bin_)
        lengths = [int(item.tokens.size) for item in items]
        starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        segments = self._segments(items, starts, gradients)
        padding = (length or self.length(bin_)) - sum(lengths)
        if padding:
            lengths.append(padding)
        if not items:
            # A segment, though empty of weights, keeps the linears on the path that calls backward.
            segments = (Segment(start=0, end=padding, weights=None),)
        ids = np.zeros(sum(lengths), dtype=np.int64)
        if items:
            ids[: starts[-1]] = np.concatenate([item.tokens for item in items])
        positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
        return MicroBatch(
            input_ids=torch.from_numpy(ids).to(device)[None],
            position_ids=torch.from_numpy(positions).to(device)[None],
            plan=PackedPlan(lengths),
            segments=segments,
            head_data=tuple(self._head_datum(item, start, device) for item, start in zip(items, starts, strict=False)),
            items=items,
        )

    def tenants(self, gradients: Sequence[AdapterGradient | None]) -> tuple[Segment, ...]:
        """An empty segment for each request, in the order of owners: for ranks that compute other ranks' tokens."""
        return tuple(
            Segment(start=0, end=0, weights=request.state.weights, gradient=gradient, owner=owner)
            for owner, (request, gradient) in enumerate(zip(self.requests, gradients, strict=True))
        )

    def _segments(
        self, items: Sequence[PackItem], starts: Sequence[int], gradients: Sequence[AdapterGradient | None]
    ) -> tuple[Segment, ...]:
        segments: list[Segment] = []
        previous = -1
        for item, start, end in zip(items, starts, starts[1:], strict=False):
            if item.owner == previous:
                segments[-1] = attrs.evolve(segments[-1], end=end)
            else:
                weights = self.requests[item.owner].state.weights
                gradient = gradients[item.owner]
                segments.append(Segment(start=start, end=end, weights=weights, gradient=gradient, owner=item.owner))
            previous = item.owner
        return tuple(segments)

    def _head_datum(self, item: PackItem, start: int, device: torch.device) -> HeadDatum:
        owner = self.requests[item.owner]
        return HeadDatum(
            owner=item.owner,
            positions=torch.from_numpy(item.cells.positions + start).to(device),
            inputs={name: _tensor(values).to(device) for name, values in item.cells.inputs.items()},
            loss=owner.loss,
            config=effective_config(owner.request.loss_fn_config, owner.loss),
            needs_gradient=not owner.request.forward_only,
        )


def _tensor(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
    # Arrays that came over a process border are read-only views, which torch will not wrap.
    return torch.from_numpy(values if values.flags.writeable else values.copy())
