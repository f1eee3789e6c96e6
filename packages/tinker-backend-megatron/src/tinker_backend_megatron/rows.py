"""The part of an adapter's row that one rank holds.

Of a linear whose output is split over tensor-parallel ranks, B is split and A is with all of them; of one whose input
is split it is the other way round.  A rank computes a part of the gradient of what it shares.  Its row is in three
parts, by the ranks that hold the same numbers: shared by tensor-parallel ranks, its own, and of its experts.

Shapes: A ``[rank, in]``, B ``[out, rank]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

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


@attrs.frozen(kw_only=True)
class LinearPlace:
    """Where A and B of a linear begin in a row."""

    linear: LinearSpec
    a: int
    b: int

    def views(self, row: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B."""
        return self.view_a(row, rank), self.view_b(row, rank)

    def view_a(self, row: torch.Tensor, rank: int, begin: int = 0) -> torch.Tensor:
        """A, in what is left of a row from ``begin`` on."""
        first = self.a - begin
        return row[first : first + rank * self.linear.in_features].view(rank, self.linear.in_features)

    def view_b(self, row: torch.Tensor, rank: int, begin: int = 0) -> torch.Tensor:
        """B, in what is left of a row from ``begin`` on."""
        first = self.b - begin
        return row[first : first + rank * self.linear.out_features].view(self.linear.out_features, rank)


class RowViews(Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
    """(A, B) of linears as views of a row, made when they are asked for: with experts there are thousands."""

    def __init__(self, row: torch.Tensor, rank: int, places: Mapping[str, LinearPlace]) -> None:
        self._row, self._rank, self._places = row, rank, places
        self._made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __getitem__(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._made.get(name)
        if found is None:
            found = self._made[name] = self._places[name].views(self._row, self._rank)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class ShardedLayout(AdapterLayout):
    """Where A and B of a rank's linears lie in its row."""

    def __init__(self, whole: AdapterLayout, shards_of: ShardsOf, rank: int, world: MegatronWorld) -> None:
        wanted = {linear.name for linear in whole.linears}
        self._whole, self._world, self._shards_of = whole, world, shards_of
        self._shards = [shard for shard in shards_of(rank) if shard.spec.name in wanted]
        self.linears = tuple(shard.local for shard in self._shards)
        self.rank, self.scale = whole.rank, whole.scale
        self._places = self._lay_out(world.topology.tensor)
        self._originals = self._find_originals(rank)
        self._others: dict[int, ShardedLayout] = {}

    def _lay_out(self, tensor: int) -> dict[str, LinearPlace]:
        """Where everything lies, in model order."""
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
        return {
            linear.name: LinearPlace(linear=linear, a=starts[linear.name][0], b=starts[linear.name][1])
            for linear in self.linears
        }

    @property
    def whole(self) -> AdapterLayout:
        """The layout of checkpoints."""
        return self._whole

    def parts(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What tensor-parallel ranks share, what this rank has for its own, and what belongs to its experts."""
        a, b, c, d = self._bounds
        return row[a:b], row[b:c], row[c:d]

    def views(self, row: torch.Tensor) -> RowViews:
        """(A, B) of every linear of this rank as views of its row."""
        return RowViews(row, self.rank, self._places)

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
        """The whole row in rank 0, every number of it sent once, over host memory; a collective."""
        world = self._world
        begin, end = self._originals
        if world.rank != 0:
            if begin < end:
                part, is_copy = _on_host(row[begin:end], copies)
                dist.send(part, dst=0)
                copies.release([part] if is_copy else [])
            return None
        gathered = copies.room(self._whole.size, pinned=row.is_cuda)
        whole = self._whole.views(gathered)
        part, is_copy = _on_host(row[begin:end], copies)
        self._put(part, whole)
        copies.release([part] if is_copy else [])
        for rank in range(1, world.size):
            sender = self._layout_of(rank)
            begin, end = sender._originals
            if begin < end:
                part = copies.room(end - begin, pinned=row.is_cuda)
                dist.recv(part, src=rank)
                sender._put(part, whole)
                copies.release([part])
        return gathered

    def _layout_of(self, rank: int) -> ShardedLayout:
        if rank not in self._others:
            self._others[rank] = ShardedLayout(self._whole, self._shards_of, rank, self._world)
        return self._others[rank]

    def _find_originals(self, rank: int) -> tuple[int, int]:
        """The range of the row that this rank is the first to hold, of all ranks with the same numbers."""
        place = self._world.topology.place(rank)
        shared, own, expert, end = self._bounds
        is_first = place.data == 0 and place.context == 0
        start = expert if not is_first else own if place.tensor else shared
        return start, end if place.expert_data == 0 else expert

    def _put(self, part: torch.Tensor, whole: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy what this rank is the first to hold into a whole row."""
        begin, end = self._originals
        for shard, place in zip(self._shards, self._places.values(), strict=True):
            whole_a, whole_b = whole[shard.spec.name]
            if begin <= place.a < end:
                whole_a[:, slice(*shard.inputs)] = place.view_a(part, self.rank, begin)
            if begin <= place.b < end:
                whole_b[slice(*shard.outputs)] = place.view_b(part, self.rank, begin)

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


def _on_host(row: torch.Tensor, copies: HostCopies) -> tuple[torch.Tensor, bool]:
    """A row on the CPU, and whether it is a copy that has to be released."""
    return (copies.copy(row), True) if row.is_cuda else (row.detach(), False)
