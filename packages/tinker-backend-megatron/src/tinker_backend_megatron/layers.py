"""The modules of a layer that run the same on CPUs and on GPUs, without Transformer Engine.

Shapes: T packed tokens, H query heads and h key-value heads of this rank, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from tinker_backend_megatron.context import PassContext
from tinker_core.training.attention import AttentionPlan


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 in the order of Hugging Face models."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:  # noqa: ANN401
        super().__init__()
        device = None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class PlannedAttention(MegatronModule):  # type: ignore[misc]
    """Core attention that rotates queries and keys and then asks the pass's plan."""

    pass_context: PassContext

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,  # noqa: ANN401 - mask type and the like, which a plan decides
        softmax_scale: float | None = None,
        **_: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(config=config)
        del args
        self.layer_index = layer_number - 1
        assert config.kv_channels is not None
        self.scaling = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query_T1HD: torch.Tensor,
        key_T1hD: torch.Tensor,
        value_T1hD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        """Attention output ``[T, 1, H * D]``."""
        del attention_mask
        context = self.pass_context
        assert context.plan is not None
        assert context.rotary is not None
        cos, sin = context.rotary
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_T1HD, key_T1hD, value_T1hD))
        out = self.attend(context.plan, _rotate(query, cos, sin), _rotate(key, cos, sin), value)
        return out.permute(2, 0, 1, 3).flatten(2).contiguous()

    def attend(
        self, plan: AttentionPlan, q_1HTD: torch.Tensor, k_1hTD: torch.Tensor, v_1hTD: torch.Tensor
    ) -> torch.Tensor:
        """Attention output ``[1, H, T, D]`` of rotated queries and keys."""
        return plan.attend(self.layer_index, q_1HTD, k_1hTD, v_1hTD, self.scaling)


def _rotate(x: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[1, heads, T, D]``."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos_TD + turned * sin_TD
