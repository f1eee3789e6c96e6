"""The layer specification: Megatron-Core's layers with our norms, attention and linears. The same on every device."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from tinker_backend_megatron.architecture import Architecture
from tinker_backend_megatron.layers import PlannedAttention, RMSNorm
from tinker_backend_megatron.linears import LoraColumnLinear, LoraRowLinear


def block_spec(architecture: Architecture, num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one stage, and the final norm."""
    return TransformerBlockSubmodules(layer_specs=[_layer_spec(architecture)] * num_layers, layer_norm=RMSNorm)


def _layer_spec(architecture: Architecture) -> ModuleSpec:
    norm = RMSNorm if architecture.normalizes_qk else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=LoraColumnLinear,
            core_attention=PlannedAttention,
            linear_proj=LoraRowLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=LoraColumnLinear, linear_fc2=LoraRowLinear))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
