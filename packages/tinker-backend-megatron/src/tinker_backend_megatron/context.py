"""What the modules of one model share during a forward.

Shapes: T packed tokens, t those that a rank's experts are handed, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinker_core.training.adapters import Segment
from tinker_core.training.attention import AttentionPlan
from tinker_core.training.lora import LoraContext


class PassContext(LoraContext):
    """The pass in progress."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: AttentionPlan | None = None
        self.rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        """Cosines and sines ``[T, D]`` in compute type."""
        self.token_owners: torch.Tensor | None = None
        """Indexes into `tenants` by token, int64, once the experts of a layer have asked."""
        self._tenants: tuple[Segment, ...] = ()

    @property
    def tenants(self) -> tuple[Segment, ...]:
        """The adapters of this pass, the same in all ranks. Without `serving`, ranks run the same segments."""
        return self._tenants or self.segments

    def owner(self, index: int) -> int:
        """The place in `tenants` of a segment."""
        return self.segments[index].owner if self._tenants else index

    @contextmanager
    def serving(self, tenants: tuple[Segment, ...]) -> Iterator[None]:
        """Forwards whose segments name their owners among the tenants of all ranks."""
        self._tenants = tenants
        try:
            yield
        finally:
            self._tenants = ()

    @contextmanager
    def forward(
        self, plan: AttentionPlan, segments: tuple[Segment, ...], rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> Iterator[None]:
        """A forward over packed tokens."""
        self.plan, self.segments, self.rotary = plan, segments, rotary
        try:
            yield
        finally:
            self.plan, self.segments, self.rotary, self.token_owners = None, (), None, None
