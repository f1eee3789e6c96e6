"""Transformer Engine's attention and norm; linears stay this backend's own, for the LoRA between their collectives.

For CUDA devices; see `tinker_backend_megatron.te_option` for what it needs.

Shapes: T packed tokens, H query heads and h key-value heads of this rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from tinker_backend_megatron.layers import PlannedAttention
from tinker_core.training.attention import AttentionPlan, PackedPlan

TransformerEngineNorm = TENorm
"""Root-mean-square norm by Transformer Engine, as the configuration says."""


class TransformerEngineAttention(PlannedAttention):
    """Packed causal attention by Transformer Engine; any other plan does its own."""

    def __init__(self, config: TransformerConfig, layer_number: int, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(config, layer_number, softmax_scale=settings.get("softmax_scale"))
        self.fused = TEDotProductAttention(config=config, layer_number=layer_number, **settings)

    def attend(
        self, plan: AttentionPlan, q_1HTD: torch.Tensor, k_1hTD: torch.Tensor, v_1hTD: torch.Tensor
    ) -> torch.Tensor:
        """Attention output ``[1, H, T, D]`` of rotated queries and keys."""
        if type(plan) is not PackedPlan:
            return super().attend(plan, q_1HTD, k_1hTD, v_1hTD)
        # Out of training it would not keep what backward needs; the model is in evaluation mode for good.
        self.fused.train(torch.is_grad_enabled())
        offsets, longest = plan.offsets(q_1HTD.device), max(plan.lengths)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (q_1HTD, k_1hTD, v_1hTD))
        out: torch.Tensor = self.fused(query, key, value, None, AttnMaskType.padding_causal, packed_seq_params=packed)
        return out.view(query.shape).transpose(0, 1)[None]
