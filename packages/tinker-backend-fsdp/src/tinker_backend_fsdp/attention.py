"""Hugging Face models that attend by plan: one attention function, registered as ``"tinker"``, asks the pass's plan.

Shapes: H query heads, h key-value heads, T packed tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from tinker_core.training.attention import AttentionPlan

ATTENTION_NAME = "tinker"
"""The ``attn_implementation`` of every model this package loads."""


def _planned_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    plan: AttentionPlan,
    scaling: float,
    **_: Any,  # noqa: ANN401 - Hugging Face passes dropout and model-specific extras
) -> tuple[torch.Tensor, None]:
    del attention_mask
    layer_index = module.layer_idx
    assert isinstance(layer_index, int)
    out = plan.attend(layer_index, query, key, value, scaling)
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make ``attn_implementation="tinker"`` known to Hugging Face transformers; may be called more than once."""
    AttentionInterface.register(ATTENTION_NAME, _planned_attention)
