"""Context parallelism: ranks share the tokens of each micro-batch. Runs on every device, without Transformer Engine.

The tokens are cut into twice as many chunks as there are ranks, and each rank takes one from the front and its mirror
image from the back: so all of them get about the same part of causal attention.  Every layer but attention looks at
one token at a time.  For attention, each rank gathers the keys and values of all tokens and computes its own queries.
The head gathers hidden states and computes the rank's part of the target cells.  Whatever a rank finds, losses,
logprobs and gradients, is a part that the sums over ranks after a pass complete.

Shapes: T packed tokens of a micro-batch, t those of this rank (T / ranks), H query heads, h key-value heads, D head
size, N target cells of a datum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from tinker_core.training.adapters import Segment
from tinker_core.training.attention import PackedPlan, kernel_for, variable_length_attention
from tinker_core.training.cells import TARGETS
from tinker_core.training.logprobs import HeadDatum, HeadResult, clip_segments
from tinker_core.training.micro_batch import MicroBatch


@attrs.frozen(kw_only=True)
class ContextRanks:
    """The ranks that share the tokens, and which of them this one is."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    def ranges(self, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The tokens of this rank, from and to, out of ``length``: a chunk of the front and one of the back."""
        chunk = length // (2 * self.size)
        mirrored = 2 * self.size - 1 - self.rank
        return (self.rank * chunk, (self.rank + 1) * chunk), (mirrored * chunk, (mirrored + 1) * chunk)

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """``[t, ...]`` of every rank as ``[T, ...]``; backward adds up the gradients that the ranks compute."""
        if self.size == 1:
            return local
        whole: torch.Tensor = _GatherTokens.apply(local, self)  # type: ignore[no-untyped-call]
        return whole

    @property
    def _places(self) -> list[int]:
        """Where the chunks of the whole lie among those of rank 0, rank 1 and so on."""
        return [*range(0, 2 * self.size, 2), *reversed(range(1, 2 * self.size, 2))]


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, ranks: ContextRanks) -> torch.Tensor:  # noqa: ANN401
        ctx.ranks = ranks
        found = local.new_empty(ranks.size * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(found, local.contiguous(), group=ranks.group)
        chunks = found.chunk(2 * ranks.size)
        return torch.cat([chunks[place] for place in ranks._places])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        ranks: ContextRanks = ctx.ranks
        chunks = grad.chunk(2 * ranks.size)
        order = sorted(range(2 * ranks.size), key=ranks._places.__getitem__)
        # Parts are added up in float32: there are as many as ranks, and bfloat16 would round after each.
        by_rank = torch.cat([chunks[place] for place in order]).float()
        mine = by_rank.new_empty(grad.shape[0] // ranks.size, *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, by_rank, group=ranks.group)
        return mine.to(grad.dtype), None


@attrs.frozen(kw_only=True)
class _Piece:
    """The queries of this rank in one run of one sequence."""

    sequence: int
    queries: int
    keys: int
    """From the beginning of the sequence to the last query."""


class ContextParallelPlan(PackedPlan):
    """Causal attention of this rank's queries, to keys of all ranks."""

    def __init__(self, lengths: Sequence[int], ranks: ContextRanks) -> None:
        super().__init__(lengths)
        self._ranks = ranks
        self._pieces = [piece for bounds in ranks.ranges(sum(lengths)) for piece in _pieces(lengths, *bounds)]
        self._masks: dict[_Piece, torch.Tensor] = {}
        self._both_offsets: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(
        self,
        layer_index: int,
        q_1HtD: torch.Tensor,
        k_1htD: torch.Tensor,
        v_1htD: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attention ``[1, H, t, D]`` of this rank's tokens to themselves and all earlier ones of their sequences."""
        del layer_index
        # Keys and values are one tensor on the way: one exchange forward, one backward.
        local = torch.cat((k_1htD[0], v_1htD[0])).transpose(0, 1)
        by_sequence = torch.split(self._ranks.gather(local), list(self.lengths))
        found = [by_sequence[piece.sequence][: piece.keys] for piece in self._pieces]
        kernel = kernel_for(q_1HtD)
        if kernel is not None:
            key, value = torch.cat(found).chunk(2, 1)
            longest = max(piece.queries for piece in self._pieces), max(piece.keys for piece in self._pieces)
            offsets = self._query_and_key_offsets(q_1HtD.device)
            return variable_length_attention(kernel, q_1HtD, key, value, offsets, longest, scaling)
        # As in `PackedPlan`: on CPUs float32 is faster.
        cast = q_1HtD.dtype is torch.bfloat16 and not q_1HtD.is_cuda
        wide = [x.float() if cast else x for x in found]
        queries = torch.split(q_1HtD.float() if cast else q_1HtD, [piece.queries for piece in self._pieces], 2)
        outs = [self._attend_piece(*each, scaling) for each in zip(self._pieces, queries, wide, strict=True)]
        return torch.cat(outs, 2).to(q_1HtD.dtype)

    def _attend_piece(self, piece: _Piece, q: torch.Tensor, kv: torch.Tensor, scaling: float) -> torch.Tensor:
        key, value = kv.transpose(0, 1)[None].chunk(2, 1)
        from_start = piece.queries == piece.keys
        return F.scaled_dot_product_attention(
            q,
            key,
            value,
            attn_mask=None if from_start else self._mask(piece, q.device),
            is_causal=from_start,
            scale=scaling,
            enable_gqa=q.shape[1] != key.shape[1],
        )

    def _mask(self, piece: _Piece, device: torch.device) -> torch.Tensor:
        """Which keys each query sees, bool ``[queries, keys]``; made once for all layers."""
        if piece not in self._masks:
            everything = torch.ones(piece.queries, piece.keys, dtype=torch.bool, device=device)
            self._masks[piece] = everything.tril(piece.keys - piece.queries)
        return self._masks[piece]

    def _query_and_key_offsets(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._both_offsets is None:
            sizes = [(0, 0), *((piece.queries, piece.keys) for piece in self._pieces)]
            queries, keys = (
                torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32).t().contiguous().to(device)
            )
            self._both_offsets = queries, keys
        return self._both_offsets


def _pieces(lengths: Sequence[int], start: int, end: int) -> Iterator[_Piece]:
    first = 0
    for sequence, length in enumerate(lengths):
        low, high = max(start, first), min(end, first + length)
        if low < high:
            yield _Piece(sequence=sequence, queries=high - low, keys=high - first)
        first += length


class ContextShare:
    """A rank's part of a micro-batch: its tokens for the layers, its target cells for the head."""

    def __init__(self, batch: MicroBatch, ranks: ContextRanks) -> None:
        self.batch = batch
        """Input of this rank's layers, and of the head the data; the head's segments are those of the whole batch."""
        self._cells: tuple[tuple[int, int], ...] | None = None
        if ranks.size == 1:
            return
        length = batch.input_ids.shape[1]
        ranges = ranks.ranges(length)
        self._cells = _share_cells(batch, ranks)
        self._counts = [item.cells.positions.size for item in batch.items]
        self.batch = attrs.evolve(
            batch,
            input_ids=_take(batch.input_ids, ranges),
            position_ids=_take(batch.position_ids, ranges),
            plan=ContextParallelPlan(batch.plan.lengths, ranks),
            segments=_local_segments(batch.segments, ranges),
            head_data=tuple(_part(*each) for each in zip(batch.head_data, self._cells, strict=True)),
        )

    def complete(self, result: HeadResult) -> HeadResult:
        """The head's result with a logprob for every cell: zero for those of other ranks, ready to be summed."""
        if self._cells is not None:
            found = zip(result.logprobs, self._cells, self._counts, strict=True)
            result.logprobs = [F.pad(part, (low, count - high)) for part, (low, high), count in found]
        return result


def _take(ids_1T: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([ids_1T[:, start:end] for start, end in ranges], 1)


def _local_segments(segments: tuple[Segment, ...], ranges: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
    """The segments of the tokens in some ranges, counted in what the ranges make up together."""
    local: list[Segment] = []
    shift = 0
    for start, end in ranges:
        local.extend(
            attrs.evolve(one, start=one.start + shift, end=one.end + shift)
            for one in clip_segments(segments, start, end)
        )
        shift += end - start
    # Without any, linears would leave autograd's path in this rank, and the others would wait for its part of backward.
    return tuple(local) or (Segment(start=0, end=shift, weights=None),)


def _share_cells(batch: MicroBatch, ranks: ContextRanks) -> tuple[tuple[int, int], ...]:
    """This rank's cells of each datum, from and to.

    They are dealt out evenly, in order.  A loss that looks at a datum as a whole stays with one rank: the one that has
    its middle.
    """
    counts = [item.cells.positions.size for item in batch.items]
    ends = np.cumsum([0, *counts]).tolist()
    low, high = (ends[-1] * edge // ranks.size for edge in (ranks.rank, ranks.rank + 1))
    found = []
    for datum, start, count in zip(batch.head_data, ends, counts, strict=False):
        if datum.loss.per_token:
            found.append((min(max(low - start, 0), count), min(max(high - start, 0), count)))
        else:
            found.append((0, count) if low <= start + count // 2 < high else (0, 0))
    return tuple(found)


def _part(datum: HeadDatum, cells: tuple[int, int]) -> HeadDatum:
    low, high = cells
    if high - low == datum.positions.numel():
        return datum
    # Inputs of another shape belong to losses that see all of a datum or nothing of it.
    names = datum.inputs if datum.loss.per_token else (TARGETS,)
    inputs = {name: datum.inputs[name][low:high] for name in names}
    return attrs.evolve(datum, positions=datum.positions[low:high], inputs=inputs)
