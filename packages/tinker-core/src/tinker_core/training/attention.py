"""Attention by plan: who may attend to whom is decided per pass, not by a mask.

A model hands queries, keys and values (after rotary embedding) to the pass's `AttentionPlan`.  A trainer packs
sequences (`PackedPlan`); a sampler brings a plan with its own key-value cache.

Shapes: H query heads, h key-value heads, T packed tokens, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention


class AttentionPlan(Protocol):
    """How the tokens of one pass attend."""

    def attend(
        self,
        layer_index: int,
        q_1HTD: torch.Tensor,
        k_1hTD: torch.Tensor,
        v_1hTD: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attention output ``[1, H, T, D]`` of one layer for the new tokens."""


class PackedPlan:
    """Causal attention inside each of several sequences that lie one after the other."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        """Tokens of each sequence."""
        self._offsets: torch.Tensor | None = None

    def attend(
        self,
        layer_index: int,
        q_1HTD: torch.Tensor,
        k_1hTD: torch.Tensor,
        v_1hTD: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attention of every token to itself and the earlier tokens of its own sequence."""
        del layer_index
        kernel = kernel_for(q_1HTD)
        if kernel is not None:
            key, value = (x[0].transpose(0, 1) for x in (k_1hTD, v_1hTD))
            offsets, longest = self.offsets(q_1HTD.device), max(self.lengths)
            return variable_length_attention(
                kernel, q_1HTD, key, value, (offsets, offsets), (longest, longest), scaling
            )
        # The backward kernel of bfloat16 attention on CPUs is several times slower than the float32 one.
        cast = q_1HTD.dtype is torch.bfloat16 and not q_1HTD.is_cuda
        q, k, v = (x.float() if cast else x for x in (q_1HTD, k_1hTD, v_1hTD))
        out = causal_attention(q, k, v, self.lengths, scaling)
        return out.to(q_1HTD.dtype)

    def offsets(self, device: torch.device) -> torch.Tensor:
        """Where sequences begin, and T at the end: int32, made once."""
        if self._offsets is None:
            ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            self._offsets = ends.to(device)
        return self._offsets


_HALF = (torch.bfloat16, torch.float16)


@functools.cache
def variable_length_kernel() -> Callable[..., Any] | None:
    """Torch's attention over packed sequences, where this torch has it with all that is needed; else None.

    Its arguments have grown from release to release; without it each sequence gets a call of its own.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa"}
    return varlen_attn if needed <= inspect.signature(varlen_attn).parameters.keys() else None


def kernel_for(q_1HTD: torch.Tensor) -> Callable[..., Any] | None:
    """The kernel over packed sequences, for queries that it takes."""
    return variable_length_kernel() if q_1HTD.is_cuda and q_1HTD.dtype in _HALF else None


def variable_length_attention(
    kernel: Callable[..., Any],
    q_1HTD: torch.Tensor,
    k_ShD: torch.Tensor,
    v_ShD: torch.Tensor,
    offsets: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scaling: float,
) -> torch.Tensor:
    """Causal attention ``[1, H, T, D]`` of packed queries to S packed keys, the last query of each seeing its last key.

    ``offsets`` and ``longest`` are those of the sequences' queries and of their keys.
    """
    out = kernel(
        q_1HTD[0].transpose(0, 1),
        k_ShD,
        v_ShD,
        *offsets,
        *longest,
        scale=scaling,
        # A right window of 0 is causal, counted from the end of the keys.
        window_size=(-1, 0),
        enable_gqa=q_1HTD.shape[1] != k_ShD.shape[1],
    )
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return result.transpose(0, 1)[None]


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scaling: float
) -> torch.Tensor:
    """Causal attention of each sequence alone; ``lengths`` sum to T. Takes and returns ``[1, heads, T, D]``."""
    grouped = q.shape[1] != k.shape[1]
    if len(lengths) == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    sizes = list(lengths)
    parts = zip(*(torch.split(x, sizes, 2) for x in (q, k, v)), strict=True)
    outs = [
        F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scaling, enable_gqa=grouped) for a, b, c in parts
    ]
    return torch.cat(outs, 2)
