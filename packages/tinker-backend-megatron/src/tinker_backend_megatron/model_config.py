"""Megatron-Core's configuration for a model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from megatron.core.transformer.transformer_config import TransformerConfig

from tinker_backend_megatron.architecture import Architecture
from tinker_backend_megatron.topology import Topology

_FIELDS = {field.name for field in fields(TransformerConfig)}
# Said, because Megatron-Core warns of its own default; the field has another name since 0.19.
_NO_CUDA_GRAPHS: dict[str, Any] = {"cuda_graph_modules" if "cuda_graph_modules" in _FIELDS else "cuda_graph_scope": []}


def make_config(
    architecture: Architecture,
    topology: Topology,
    dtype: torch.dtype,
    device: torch.device,
    *,
    transformer_engine: bool = False,
) -> TransformerConfig:
    """Plain arithmetic: no dropout, no fused kernels that need Apex or Transformer Engine, sums instead of means."""
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        qk_layernorm=architecture.normalizes_qk,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.has_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tensor,
        pipeline_model_parallel_size=topology.pipeline,
        context_parallel_size=topology.context,
        sequence_parallel=topology.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        transformer_impl="transformer_engine" if transformer_engine else "local",
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_NO_CUDA_GRAPHS,
        **_expert_settings(architecture, topology),
    )


def _expert_settings(architecture: Architecture, topology: Topology) -> dict[str, Any]:
    experts = architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn_size,
        # What `tinker_backend_megatron.experts.Router` does.
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": topology.expert_dispatcher,
        "expert_model_parallel_size": topology.expert,
        "expert_tensor_parallel_size": 1,
    }
