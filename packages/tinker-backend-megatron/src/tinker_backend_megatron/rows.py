"""The part of an adapter's row that one rank holds.

Of a linear whose output is split over tensor-parallel ranks, B is split and A is with all of them; of one whose input
is split it is the other way round.  A rank computes a part of the gradient of what it shares.  Its row is in three
parts, by the ranks that hold the same numbers: shared by tensor-parallel ranks, its own, and of its experts.

Shapes: A ``[rank, in]``, B ``[out, rank]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs
import torch
import torch.distributed as dist

from tinker_backend_megatron.world import MegatronWorld
from tinker_core.training.adapters import AdapterLayout, LinearSpec
from tinker_core.training.host_copies import HostCopies


@attrs.frozen(kw_only=True)
class LinearShard:
    """A rank's part of a linear."""

    spec: LinearSpec
    """The whole linear."""
    inputs: tuple[int, int]
    """Columns of A from and to, of all of them unless the input is split."""
    outputs: tuple[int, int]
    """Rows of B from and to."""
    expert: bool = False
    """Whether it belongs to an expert, which is never split."""

    @property
    def splits_inputs(self) -> bool:
        """Whether tensor-parallel ranks share the input."""
        return self.inputs != (0, self.spec.in_features)

    @property
    def local(self) -> LinearSpec:
        """The part as a linear of its own."""
        return LinearSpec(
            name=self.spec.name,
            in_features=self.inputs[1] - self.inputs[0],
            out_features=self.outputs[1] - self.outputs[0],
        )


ShardsOf = Callable[[int], Sequence[LinearShard]]
"""All linears of a rank, by rank, in model order."""


class ShardedLayout(AdapterLayout):
    """Where A and B of a rank's linears lie in its row."""

    def __init__(self, whole: AdapterLayout, shards_of: ShardsOf, rank: int, world: MegatronWorld) -> None:
        wanted = {linear.name for linear in whole.linears}
        self._whole, self._world, self._shards_of = whole, world, shards_of
        self._shards = [shard for shard in shards_of(rank) if shard.spec.name in wanted]
        self.linears = tuple(shard.local for shard in self._shards)
        self.rank, self.scale = whole.rank, whole.scale
        self._places = self._lay_out(world.topology.tensor)

    def _lay_out(self, tensor: int) -> dict[str, tuple[int, int]]:
        """Where A and B of each linear begin."""
        sizes: list[tuple[int, str, int, int]] = []
        for shard in self._shards:
            by_class = (2, 2) if shard.expert else (1, 0) if shard.splits_inputs else (0, 1)
            if tensor == 1 and not shard.expert:
                by_class = (1, 1)  # nothing is shared: one part, one sum
            sizes.append((by_class[0], shard.spec.name, 0, self.rank * shard.local.in_features))
            sizes.append((by_class[1], shard.spec.name, 1, self.rank * shard.local.out_features))
        starts: dict[str, dict[int, int]] = {}
        offset, self._bounds = 0, [0]
        for wanted in range(3):
            for by, name, which, size in sizes:
                if by == wanted:
                    starts.setdefault(name, {})[which] = offset
                    offset += size
            self._bounds.append(offset)
        self.size = offset
        return {name: (found[0], found[1]) for name, found in starts.items()}

    @property
    def whole(self) -> AdapterLayout:
        """The layout of checkpoints."""
        return self._whole

    def parts(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What tensor-parallel ranks share, what this rank has for its own, and what belongs to its experts."""
        a, b, c, d = self._bounds
        return row[a:b], row[b:c], row[c:d]

    def views(self, row: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(A, B) of every linear of this rank as views of its row."""
        views = {}
        for linear in self.linears:
            at_a, at_b = self._places[linear.name]
            a = row[at_a : at_a + self.rank * linear.in_features].view(self.rank, linear.in_features)
            b = row[at_b : at_b + self.rank * linear.out_features].view(linear.out_features, self.rank)
            views[linear.name] = (a, b)
        return views

    def initial_row(self, seed: int) -> torch.Tensor:
        """This rank's part of the row that any other world would begin with."""
        row = torch.zeros(self.size, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed % 2**63)
        views = self.views(row)
        shards = {shard.spec.name: shard for shard in self._shards}
        for linear in self._whole.linears:
            bound = 1.0 / math.sqrt(linear.in_features)
            a = torch.empty(self.rank, linear.in_features).uniform_(-bound, bound, generator=generator)
            if linear.name in shards:
                start, end = shards[linear.name].inputs
                views[linear.name][0].copy_(a[:, start:end])
        return row

    def cut(self, row: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole row."""
        mine = torch.empty(self.size, dtype=row.dtype, device=row.device)
        whole = self._whole.views(row)
        for shard, (a, b) in zip(self._shards, self.views(mine).values(), strict=True):
            whole_a, whole_b = whole[shard.spec.name]
            a.copy_(whole_a[:, slice(*shard.inputs)])
            b.copy_(whole_b[slice(*shard.outputs)])
        return mine

    def collect(self, row: torch.Tensor, copies: HostCopies) -> torch.Tensor | None:
        """The whole row in rank 0, part by part; a collective."""
        world = self._world
        if world.rank != 0:
            if self._holds_originals(world.rank):
                dist.send(row.detach().cpu(), dst=0)
            return None
        gathered = copies.room(self._whole.size, pinned=row.is_cuda)
        for rank in range(world.size):
            if not self._holds_originals(rank):
                continue
            layout = self if rank == 0 else ShardedLayout(self._whole, self._shards_of, rank, world)
            part = row.detach().cpu() if rank == 0 else torch.empty(layout.size, dtype=row.dtype)
            if rank:
                dist.recv(part, src=rank)
            layout._put(part, gathered)
        return gathered

    def _holds_originals(self, rank: int) -> bool:
        """Whether a rank is the first of those that hold the same rows, or the same experts."""
        place = self._world.topology.place(rank)
        has_experts = any(shard.expert for shard in self._shards_of(rank))
        return (place.data == 0 and place.context == 0) or (has_experts and place.expert_data == 0)

    def _put(self, row: torch.Tensor, whole_row: torch.Tensor) -> None:
        whole = self._whole.views(whole_row)
        for shard, (a, b) in zip(self._shards, self.views(row).values(), strict=True):
            whole_a, whole_b = whole[shard.spec.name]
            whole_a[:, slice(*shard.inputs)] = a
            whole_b[slice(*shard.outputs)] = b

    def norm(self, row: torch.Tensor) -> float:
        """Euclidean norm of the whole row, every number of it counted once; a collective."""
        world, place = self._world, self._world.place
        if world.size == 1:
            return float(torch.linalg.vector_norm(row))
        shared, own, expert = (torch.linalg.vector_norm(part).double().square() for part in self.parts(row))
        first = place.data == 0 and place.context == 0
        total = torch.zeros((), dtype=torch.float64, device=row.device)
        if first and place.tensor == 0:
            total += shared
        if first:
            total += own
        if place.expert_data == 0:
            total += expert
        world.sum(total)
        return float(total.sqrt())
