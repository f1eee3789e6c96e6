"""The row of all parameters that one rank holds, in the shapes that Megatron-Core gives them.

Parameters are in order of the ranks that hold the same numbers, or compute parts of the same gradient.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tinker_backend_megatron.loading import LoadedModel
from tinker_backend_megatron.mapping import ModelMap
from tinker_backend_megatron.weights import read_weights
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.errors import StorageError, TinkerError
from tinker_core.training.adapters import AdapterLayout
from tinker_core.training.weight_files import WeightFiles


class Kind(enum.IntEnum):
    """Which ranks hold a parameter, besides those with the same place and other data; rows are in this order."""

    PARTIAL = 0
    """All tensor-parallel ranks, and each computes a part of the gradient: of its heads, or of its tokens."""
    SAME = 1
    """All tensor-parallel ranks, and each computes all of the gradient."""
    OWN = 2
    """This tensor-parallel rank."""
    TIED = 3
    """This tensor-parallel rank of the first and of the last stage, for embedding and output projection."""
    EXPERT = 4
    """Ranks with these experts."""


class FullLayout(AdapterLayout):
    """Where each parameter of a rank lies in its row. To the linears of a pass it is an adapter that changes none."""

    def __init__(self, loaded: LoadedModel, world: MegatronWorld) -> None:
        self.linears, self.rank, self.scale = (), 0, 0.0
        self._map, self._world = loaded.model_map, world
        self.directory = loaded.directory
        """Where the base model's own weights are."""
        place = world.place
        self._first_layer = self._map.topology.layers_of(place.pipeline, self._map.architecture.num_layers).start
        by_kind = sorted(
            (self._kind(name), order, name, parameter.shape)
            for order, (name, parameter) in enumerate(loaded.root.named_parameters())
        )
        self._places: dict[str, tuple[int, torch.Size]] = {}
        self._bounds = [0] * (len(Kind) + 1)
        offset = 0
        for kind, _, name, shape in by_kind:
            self._places[name] = offset, shape
            offset += shape.numel()
            self._bounds[kind + 1] = offset
        for kind in Kind:
            self._bounds[kind + 1] = max(self._bounds[kind : kind + 2])
        self.size = offset
        self.num_tensors = self._count_tensors()
        """Tensors of the whole model in the Hugging Face format."""

    def _kind(self, name: str) -> Kind:
        topology, first_layer = self._map.topology, self._first_layer
        if ".experts." in name:
            return Kind.EXPERT
        if name.startswith(("embedding.", "output_layer.")):
            ties = self._map.architecture.ties_embeddings and topology.pipeline > 1
            return Kind.TIED if ties else Kind.OWN
        if any(not piece.is_whole for piece in self._map.pieces(name, first_layer, self._world.place)):
            return Kind.OWN
        of_heads = any(word in name for word in ("q_layernorm", "k_layernorm"))
        return Kind.PARTIAL if topology.sequence_parallel or of_heads else Kind.SAME

    def _count_tensors(self) -> int:
        mine = {
            piece.name
            for name in self._places
            if self._counts(self._kind(name))
            for piece in self._map.pieces(name, self._first_layer, self._world.place)
            if piece.start == 0 and piece.stop > 0
        }
        count = torch.tensor(float(len(mine)), device=self._world.device)
        self._world.sum(count)
        return int(count)

    def _counts(self, kind: Kind) -> bool:
        """Whether this rank, of all that hold the same numbers, is the one that counts them."""
        place = self._world.place
        first = place.data == 0 and place.context == 0
        if kind is Kind.EXPERT:
            return place.expert_data == 0
        if kind in (Kind.PARTIAL, Kind.SAME):
            return first and place.tensor == 0
        return first and (kind is Kind.OWN or place.pipeline == 0)

    @property
    def model_map(self) -> ModelMap:
        """Names and shapes in the Hugging Face model."""
        return self._map

    @property
    def world(self) -> MegatronWorld:
        """The ranks that share the model."""
        return self._world

    def named(self, row: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter's name in the root, and its part of a row as a view."""
        for name, (offset, shape) in self._places.items():
            yield name, row[offset : offset + shape.numel()].view(shape)

    def views(self, row: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """No linear has an adapter."""
        del row
        return {}

    def part(self, row: torch.Tensor, kind: Kind) -> torch.Tensor:
        """The parameters of a kind."""
        return row[self._bounds[kind] : self._bounds[kind + 1]]

    def parts(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """By the ranks to add a gradient up over: with tensor-parallel ones, without, and those of its experts."""
        return (
            self.part(row, Kind.PARTIAL),
            row[self._bounds[Kind.SAME] : self._bounds[Kind.TIED + 1]],
            self.part(row, Kind.EXPERT),
        )

    def join_tied(self, gradient: torch.Tensor) -> None:
        """Add up what the first and the last stage find for the matrix that they share."""
        tied = self.part(gradient, Kind.TIED)
        if tied.numel():
            dist.all_reduce(tied, group=parallel_state.get_embedding_group())

    def norm(self, row: torch.Tensor) -> float:
        """Euclidean norm of all parameters of the model, every number of it counted once; a collective."""
        total = torch.zeros((), dtype=torch.float64, device=row.device)
        for kind in Kind:
            if self._counts(kind):
                total += torch.linalg.vector_norm(self.part(row, kind)).double().square()
        self._world.sum(total)
        return float(total.sqrt())

    def initial_row(self, seed: int) -> torch.Tensor:
        """The base model's own weights in float32 on the CPU; see `read_base`."""
        del seed  # nothing is random
        row = torch.zeros(self.size, dtype=torch.float32)
        self.read_base(row)
        return row

    def read_base(self, row: torch.Tensor) -> None:
        """Fill a row of any type and device with the base model's own weights.

        Raises `StorageError` in all ranks together when the files can no longer be read; the row is then partly filled.
        """
        self._world.together(partial(self._read_base, row))

    def _read_base(self, row: torch.Tensor) -> None:
        try:
            with WeightFiles(self.directory, device=row.device) as files:
                self.read(row, files)
        except TinkerError as error:
            raise StorageError(f"the base model's weights have changed, or cannot be read again: {error}") from error

    def read(self, row: torch.Tensor, files: WeightFiles, *, prefix: str = "") -> None:
        """Fill a row from files of the whole model; raises `CheckpointMismatchError` and `StorageError`."""
        read_weights(self.named(row), self._map, self._world.place, files, prefix=prefix)
