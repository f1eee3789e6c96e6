"""Llama over packed tokens: sequences of several clients lie one after the other.

Modules have the names of the Hugging Face checkpoint, so that its weights fit and adapters are PEFT's.

Shapes: T packed tokens, N some of them, H hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from tinker_core.lora_targets import ALL_TARGETS
from tinker_core.training.adapters import LinearSpec, Segment
from tinker_core.training.attention import AttentionPlan
from tinker_core.training.lora import LoraContext, add_lora, install_lora
from tinker_core.training.vocabulary import WholeVocabulary

R = TypeVar("R")
Rotary = tuple[torch.Tensor, torch.Tensor]
Config = dict[str, Any]
"""A ``config.json``."""


class Attention(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        hidden, heads, kv_heads = map(config.__getitem__, ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        self.index, self.head_size = index, head_size_of(config)
        self.q_proj = nn.Linear(hidden, heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(heads * self.head_size, hidden, bias=False)

    def forward(self, x_1TH: torch.Tensor, rotary: Rotary, plan: AttentionPlan) -> torch.Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (linear(x_1TH).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for linear in projections)
        # The plan knows where each sequence begins and ends.
        out = plan.attend(self.index, rotate(q, rotary), rotate(k, rotary), v, self.head_size**-0.5)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, intermediate = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x_1TH: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_1TH)) * self.up_proj(x_1TH))


class Layer(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = MLP(config)

    def forward(self, x_1TH: torch.Tensor, rotary: Rotary, plan: AttentionPlan) -> torch.Tensor:
        x_1TH = x_1TH + self.self_attn(self.input_layernorm(x_1TH), rotary, plan)
        return x_1TH + self.mlp(self.post_attention_layernorm(x_1TH))


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class Unembed:
    """The output projection, as the heads of passes and of samplers use it."""

    name = "lm_head"
    weight_gradient = None

    def __init__(self, linear: nn.Linear) -> None:
        self.weight = linear.weight
        self.vocabulary = WholeVocabulary(linear.out_features)

    @torch.no_grad()
    def logits(self, hidden_NH: torch.Tensor, segments_N: tuple[Segment, ...]) -> torch.Tensor:
        logits = F.linear(hidden_NH, self.weight)
        add_lora(logits, hidden_NH, self.name, segments_N)
        return logits

    partial_logits = logits  # every rank has the whole vocabulary


class Llama(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.lora = LoraContext()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def install_lora(self) -> tuple[LinearSpec, ...]:
        """Freeze the weights and let the linears add what a pass's segments say; returns which linears can."""
        self.lora.tag = torch.zeros((), device=self.lm_head.weight.device, requires_grad=True)
        return install_lora(self, ALL_TARGETS, self.lora)

    def forward(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        plan: AttentionPlan,
        segments: tuple[Segment, ...],
        head: Callable[[torch.Tensor, Unembed], R],
    ) -> R:
        """What a head, which computes losses or draws tokens, makes of the hidden states ``[T, H]``."""
        x_1TH = self.model.embed_tokens(input_ids_1T)
        rotary = self._rotary(position_ids_1T[0], x_1TH.dtype)
        self.lora.segments = segments
        try:
            for layer in self.model.layers:
                x_1TH = layer(x_1TH, rotary, plan)
        finally:
            self.lora.segments = ()
        return head(self.model.norm(x_1TH)[0], Unembed(self.lm_head))

    def _rotary(self, position_ids_T: torch.Tensor, dtype: torch.dtype) -> Rotary:
        size, theta = head_size_of(self.config), rope_of(self.config).get("rope_theta", 10000.0)
        frequencies = theta ** (-torch.arange(0, size, 2, device=position_ids_T.device).float() / size)
        angles_TD = (position_ids_T[:, None] * frequencies).repeat(1, 2)
        return angles_TD.cos().to(dtype), angles_TD.sin().to(dtype)


def rotate(x_1nTD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotary position embedding."""
    left, right = x_1nTD.chunk(2, -1)
    return x_1nTD * rotary[0] + torch.cat([-right, left], -1) * rotary[1]


def head_size_of(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Config) -> Config:
    """Settings of the rotary embedding, wherever this version of the format has them."""
    return config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), **config}
