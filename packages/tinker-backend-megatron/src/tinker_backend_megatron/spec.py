"""The layer specification: Megatron-Core's layers with our norms, attention and linears.

The same on every device, unless Transformer Engine's norms and attention are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from tinker_backend_megatron.architecture import Architecture
from tinker_backend_megatron.architecture import Experts as ExpertShape
from tinker_backend_megatron.experts import Experts, Router
from tinker_backend_megatron.layers import PlannedAttention, RMSNorm
from tinker_backend_megatron.linears import LoraColumnLinear, LoraRowLinear


def block_spec(architecture: Architecture, config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one stage, and the final norm."""
    norm, core_attention = _kernels(config)
    layer = _layer_spec(architecture, norm, core_attention)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _kernels(config: TransformerConfig) -> tuple[Any, type[PlannedAttention]]:
    """Norm and core attention."""
    if config.transformer_impl != "transformer_engine":
        return RMSNorm, PlannedAttention
    from tinker_backend_megatron.te_spec import TransformerEngineAttention, TransformerEngineNorm

    return TransformerEngineNorm, TransformerEngineAttention


def _layer_spec(
    architecture: Architecture,
    norm: Any,  # noqa: ANN401 - a class, or something that makes a module of another
    core_attention: type[PlannedAttention],
) -> ModuleSpec:
    head_norm = norm if architecture.normalizes_qk else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=LoraColumnLinear,
            core_attention=core_attention,
            linear_proj=LoraRowLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_feed_forward(architecture),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _feed_forward(architecture: Architecture) -> ModuleSpec | Callable[..., MLP]:
    if architecture.experts is not None:
        return _mixture(architecture.experts)
    size = architecture.ffn_size
    submodules = MLPSubmodules(linear_fc1=LoraColumnLinear, linear_fc2=LoraRowLinear)
    if hasattr(MLP, "as_mlp_submodule"):  # as newer Megatron-Core wants it
        return partial(MLP.as_mlp_submodule, submodules=submodules, ffn_hidden_size=size)
    return ModuleSpec(module=MLP, params={"ffn_hidden_size": size}, submodules=submodules)


def _mixture(shape: ExpertShape) -> ModuleSpec:
    router = partial(Router, renormalizes=shape.renormalizes)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=Experts, router=router))
