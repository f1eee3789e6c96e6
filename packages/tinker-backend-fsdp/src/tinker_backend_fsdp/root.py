"""The root module of a sharded causal language model: all use of base weights happens inside its ``forward``.

Shapes: T packed tokens, N some of them, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from tinker_core.training.adapters import Segment
from tinker_core.training.attention import AttentionPlan
from tinker_core.training.lora import LoraContext, add_lora
from tinker_core.training.vocabulary import WholeVocabulary

R = TypeVar("R")


class Unembed:
    """The output projection, with every segment's own LoRA on it. Valid inside `CausalRoot.forward` only."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        # Not a module attribute of anything: sharding must see the linear once, in its own place.
        self._linear = linear
        self.name = name
        """Qualified name of the linear, the key of its LoRA views."""
        self.vocabulary = WholeVocabulary(linear.out_features)
        self.weight_gradient = None

    @property
    def weight(self) -> torch.Tensor:
        """``[V, H]``; the very tensor of the embedding when the model ties them."""
        return self._linear.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """``[V]`` or None."""
        return self._linear.bias

    @torch.no_grad()
    def logits(self, hidden_NH: torch.Tensor, segments_N: tuple[Segment, ...]) -> torch.Tensor:
        """Logits ``[N, V]`` in compute type, without autograd; the segments index N."""
        logits = F.linear(hidden_NH, self.weight, self.bias)
        add_lora(logits, hidden_NH, self.name, segments_N)
        return logits

    def partial_logits(self, hidden_NH: torch.Tensor, segments_N: tuple[Segment, ...]) -> torch.Tensor:
        """All logits: every rank has the whole vocabulary."""
        return self.logits(hidden_NH, segments_N)


class CausalRoot(nn.Module):
    """A Hugging Face causal LM whose head is chosen per call."""

    def __init__(self, causal_lm: nn.Module, context: LoraContext) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._context = context
        linear = causal_lm.get_submodule("lm_head")
        assert isinstance(linear, nn.Linear)
        self.unembed = Unembed(linear, "lm_head")

    def forward(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        plan: AttentionPlan,
        segments: tuple[Segment, ...],
        head: Callable[[torch.Tensor, Unembed], R],
    ) -> R:
        """Run the transformer over packed tokens and return ``head(hidden_TH, unembed)``.

        A head whose hidden states are to be differentiated later must return them inside a plain tuple, so that
        sharding finds the tensor and gathers weights again for backward.
        """
        self._context.segments = segments
        try:
            decoder: Any = self.causal_lm.get_submodule("model")
            output = decoder(input_ids=input_ids_1T, position_ids=position_ids_1T, plan=plan, use_cache=False)
        finally:
            self._context.segments = ()
        return head(output.last_hidden_state[0], self.unembed)
