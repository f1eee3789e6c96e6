"""What the sampler asks of a trainer's root module.

Shapes: T packed tokens, N some of them, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from tinker_core.training.adapters import Segment
from tinker_core.training.attention import AttentionPlan

R = TypeVar("R")


class Unembed(Protocol):
    """The output projection; valid while its root's forward runs."""

    def logits(self, hidden_NH: torch.Tensor, segments_N: tuple[Segment, ...]) -> torch.Tensor:
        """Logits ``[N, V]`` of all tokens in every rank, LoRA included, in compute type and without autograd.

        The segments index N. Where ranks share the vocabulary this is a collective.
        """


class Root(Protocol):
    """A causal language model that attends by plan and whose head is chosen per call."""

    def __call__(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        plan: AttentionPlan,
        segments: tuple[Segment, ...],
        head: Callable[[torch.Tensor, Unembed], R],
    ) -> R:
        """Run the layers and return ``head(hidden_TH, unembed)``.

        Every layer calls the plan once, with its own index and the T tokens of this call; ranks that share attention
        heads bring their own. Tokens that no segment covers are computed by the bare base model.
        """
