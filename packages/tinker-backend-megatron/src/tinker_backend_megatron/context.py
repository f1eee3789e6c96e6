"""What the modules of one model share during a forward.

Shapes: T packed tokens, D head size.
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

    @contextmanager
    def forward(
        self, plan: AttentionPlan, segments: tuple[Segment, ...], rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> Iterator[None]:
        """A forward over packed tokens."""
        self.plan, self.segments, self.rotary = plan, segments, rotary
        try:
            yield
        finally:
            self.plan, self.segments, self.rotary = None, (), None
