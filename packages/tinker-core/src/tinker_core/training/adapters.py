"""A LoRA adapter is one flat row: A and B of all modules are views of it.

Create, zero, clip, step, all-reduce, snapshot and restore are then single operations on a row.  The weights that train
are float32; `AdapterWeights` is the copy in compute type that the forward pass reads.

Shapes: A ``[rank, in]``, B ``[out, rank]``; the update of a linear is ``scale * B @ A``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch

from tinker_core.training.host_copies import HostCopies
from tinker_core.types import LoraConfig


@attrs.frozen(kw_only=True)
class LinearSpec:
    """A linear module of the base model that adapters may change."""

    name: str
    """Qualified name in the Hugging Face model, for example ``model.layers.0.self_attn.q_proj``."""
    in_features: int
    out_features: int


class AdapterLayout:
    """Where A and B of each module lie in a row of a given rank."""

    def __init__(self, linears: tuple[LinearSpec, ...], config: LoraConfig) -> None:
        self.linears = linears
        self.rank = config.rank
        self.scale = config.alpha / config.rank
        self._offsets: dict[str, tuple[int, int]] = {}
        offset = 0
        for linear in linears:
            start_b = offset + self.rank * linear.in_features
            self._offsets[linear.name] = (offset, start_b)
            offset = start_b + self.rank * linear.out_features
        self.size = offset

    @property
    def whole(self) -> AdapterLayout:
        """Where everything lies in a row that no rank shares with others: the layout of checkpoints."""
        return self

    def collect(self, row: torch.Tensor, copies: HostCopies) -> torch.Tensor | None:
        """A copy in host memory of a row of `whole`. A layout of which ranks hold parts gives it to rank 0 only."""
        return copies.copy(row)

    def cut(self, row: torch.Tensor) -> torch.Tensor:
        """This rank's part of a row of `whole`."""
        return row

    def norm(self, row: torch.Tensor) -> float:
        """Euclidean norm of the whole row, of which ranks may hold parts; then a collective."""
        return float(torch.linalg.vector_norm(row))

    def views(self, row: torch.Tensor) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """(A, B) of every module as views of ``row`` ``[size]``."""
        views = {}
        for linear in self.linears:
            start_a, start_b = self._offsets[linear.name]
            end_b = start_b + self.rank * linear.out_features
            a = row[start_a:start_b].view(self.rank, linear.in_features)
            b = row[start_b:end_b].view(linear.out_features, self.rank)
            views[linear.name] = (a, b)
        return views

    def initial_row(self, seed: int) -> torch.Tensor:
        """A fresh float32 row on the CPU: A uniform in ±1/sqrt(in) as in PEFT, B zero; the same on every device."""
        row = torch.zeros(self.size, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed % 2**63)
        views = self.views(row)
        for linear in self.linears:
            bound = 1.0 / math.sqrt(linear.in_features)
            views[linear.name][0].uniform_(-bound, bound, generator=generator)
        return row


class AdapterWeights:
    """An adapter as the forward pass reads it: a row in compute type, never written to."""

    def __init__(self, layout: AdapterLayout, row: torch.Tensor) -> None:
        self.layout = layout
        self.row = row
        self.scale = layout.scale
        self.views = layout.views(row)


class AdapterGradient:
    """Where the backward pass of one request adds an adapter's gradient: a float32 row."""

    def __init__(self, layout: AdapterLayout, row: torch.Tensor) -> None:
        self.layout = layout
        self.row = row
        self.views = layout.views(row)


@attrs.frozen(eq=False)
class Segment:
    """A run of packed tokens that belong to one adapter."""

    start: int
    end: int
    weights: AdapterWeights | None
    """None: the bare base model."""
    gradient: AdapterGradient | None = None
    """Where backward adds; None: nothing is wanted."""
    owner: int = -1
    """Index of its request in a pass, by which ranks that compute other ranks' tokens find whose they are."""
