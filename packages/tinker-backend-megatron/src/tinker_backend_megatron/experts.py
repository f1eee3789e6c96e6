"""Mixture of experts: routing as Hugging Face models do it, and experts with LoRA behind Megatron-Core's dispatchers.

Every expert is a feed-forward network of its own, with an adapter of its own in every LoRA model; a rank holds some of
them and computes the tokens that any rank of its expert-parallel group routes to them.

Shapes: t tokens of this rank, E experts, e those of this rank, R rows (a token once per chosen expert of this rank),
H hidden size, F size of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from tinker_backend_megatron.context import PassContext
from tinker_backend_megatron.row_owners import owners_of_rows, row_segments
from tinker_core.training.adapters import Segment
from tinker_core.training.lora import LoraPart, multi_lora_linear


class Router(TopKRouter):  # type: ignore[misc]
    """Softmax in float32 over all experts, then the best ones: nothing dropped, nothing random, no auxiliary loss."""

    def __init__(self, config: TransformerConfig, *, renormalizes: bool, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(config=config, **settings)
        self.weight.data = self.weight.data.to(_device(config))
        self.renormalizes = renormalizes

    def forward(self, input: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: A002, ANN401
        """Each token's weights ``[t, E]``, zero for experts that it does not go to, and to which it goes."""
        scores = F.linear(input.reshape(-1, input.shape[-1]), self.weight)
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32)
        best, experts = torch.topk(shares, self.topk, dim=-1)
        if self.renormalizes:
            best = best / best.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(scores).scatter(1, experts, best.to(scores.dtype))
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, experts, value=True)
        return weights, chosen


class ExpertLinear(nn.Module):
    """A matrix of one expert, whole, with every segment's LoRA on it."""

    parts: tuple[LoraPart, ...] = ()
    pass_context: PassContext

    def __init__(self, in_features: int, out_features: int, config: TransformerConfig) -> None:
        super().__init__()
        shape = (out_features, in_features)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=_device(config)))

    def forward(self, rows: torch.Tensor, segments: tuple[Segment, ...]) -> torch.Tensor:
        """``[n, out]`` of ``[n, in]``; segments index the rows."""
        return multi_lora_linear(rows, self.weight, None, self.parts, segments, self.pass_context.tag)


class Expert(nn.Module):
    """A gated feed-forward network, under Megatron-Core's names."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.moe_ffn_hidden_size is not None
        self.linear_fc1 = ExpertLinear(config.hidden_size, 2 * config.moe_ffn_hidden_size, config)
        self.linear_fc2 = ExpertLinear(config.moe_ffn_hidden_size, config.hidden_size, config)

    def forward(self, rows: torch.Tensor, weights: torch.Tensor, segments: tuple[Segment, ...]) -> torch.Tensor:
        """Weighted output ``[n, H]``."""
        gate, up = self.linear_fc1(rows, segments).chunk(2, dim=-1)
        found: torch.Tensor = self.linear_fc2(F.silu(gate) * up, segments)
        return found * weights[:, None]


class Experts(MegatronModule):  # type: ignore[misc]
    """The experts of a rank, one after the other."""

    pass_context: PassContext
    dispatcher: MoETokenDispatcher

    def __init__(self, num_local_experts: int, config: TransformerConfig, **_: Any) -> None:  # noqa: ANN401
        super().__init__(config=config)
        self.local_experts = nn.ModuleList(Expert(config) for _ in range(num_local_experts))

    def forward(
        self, rows_RH: torch.Tensor, tokens_per_expert: torch.Tensor, weights_R: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Weighted outputs ``[R, H]`` of rows that are sorted by expert, and no bias."""
        counts: list[int] = tokens_per_expert.tolist()
        segments = self._segments(counts)
        found = [
            expert(rows, weights, of_expert)
            for expert, rows, weights, of_expert in zip(
                self.local_experts, torch.split(rows_RH, counts), torch.split(weights_R, counts), segments, strict=True
            )
            if len(rows)
        ]
        # Without rows, too, autograd must pass here: the dispatchers of other ranks wait for this one's.
        return torch.cat(found) if found else rows_RH * weights_R[:, None], None

    def _segments(self, counts: list[int]) -> list[tuple[Segment, ...]]:
        """Whose rows each expert has. A collective, unless no adapter changes experts, which all ranks know."""
        tenants = self.pass_context.tenants
        if not any(self._is_adapted_by(tenant) for tenant in tenants):
            return [()] * len(counts)
        return row_segments(owners_of_rows(self.dispatcher, self.pass_context), counts, tenants)

    def _is_adapted_by(self, tenant: Segment) -> bool:
        if tenant.weights is None:
            return False
        first = self.local_experts[0]
        assert isinstance(first, Expert)
        parts = (*first.linear_fc1.parts, *first.linear_fc2.parts)
        return any(part.name in tenant.weights.views for part in parts)


def connect_experts(layer: MoELayer, context: PassContext) -> None:
    """Tell a layer's experts who brings their rows, and what all modules share."""
    layer.experts.dispatcher = layer.token_dispatcher
    layer.experts.pass_context = context


def _device(config: TransformerConfig) -> torch.device:
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
