"""Clears an adapter's slot on CPUs by what is in it, and not by all that would fit.

Before vLLM puts an adapter into a slot it fills the whole slot with zeros, for adapters of the greatest rank, and the
slots of modules that the adapter leaves alone too. Where memory is slow that takes longer than copying the adapter.
Slots begin as zeros, so only what an adapter has written has to go.

Shapes: L slots, R greatest rank, r rank of an adapter, in and out features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_RANKS = "_tinker_ranks"
"""Attribute of a layer: the rank of what is in each slot; slots that are clear are left out."""

_Stacked = torch.Tensor | tuple[torch.Tensor, ...]


def _ranks(layer: Any) -> dict[int, int]:  # noqa: ANN401 - vLLM is not typed
    ranks: dict[int, int] = layer.__dict__.setdefault(_RANKS, {})
    return ranks


def _parts(stacked: _Stacked) -> tuple[torch.Tensor, ...]:
    return stacked if isinstance(stacked, tuple) else (stacked,)


def reset_linear(layer: Any, index: int) -> None:  # noqa: ANN401
    """Clear a slot of a linear: A ``[L, 1, R, in]``, B ``[L, 1, out, R]``, several of each where vLLM joins some."""
    rank = _ranks(layer).pop(index, 0)
    for a in _parts(layer.lora_a_stacked):
        a[index, :, :rank] = 0
    for b in _parts(layer.lora_b_stacked):
        b[index, ..., :rank] = 0


def reset_embedding(layer: Any, index: int) -> None:  # noqa: ANN401
    """Clear a slot of an embedding: A ``[L, vocabulary, R]``, B ``[L, 1, features, R]``."""
    rank = _ranks(layer).pop(index, 0)
    layer.lora_a_stacked[index, ..., :rank] = 0
    layer.lora_b_stacked[index, ..., :rank] = 0


def noting(set_lora: Callable[..., None]) -> Callable[..., None]:
    """A layer's ``set_lora`` that remembers the rank of what it has put into a slot."""

    def set_and_note(layer: Any, index: int, lora_a: Any, lora_b: Any) -> None:  # noqa: ANN401
        factors = lora_a if isinstance(lora_a, list) else [lora_a]
        try:
            set_lora(layer, index, lora_a, lora_b)  # begins with a reset
        finally:  # what could not be set entirely has to go as well
            _ranks(layer)[index] = max((factor.shape[0] for factor in factors if factor is not None), default=0)

    return set_and_note


def install() -> None:
    """Put these in the place of vLLM's own; raises `RuntimeError` when vLLM no longer clears slots in this way."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
    from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
    from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA

    resets: dict[Any, Callable[[Any, int], None]] = {
        BaseLinearLayerWithLoRA: reset_linear,
        LogitsProcessorWithLoRA: reset_linear,
        VocabParallelEmbeddingWithLoRA: reset_embedding,
    }
    setters: tuple[Any, ...] = (*resets, MergedColumnParallelLinearWithLoRA)
    for layer, method in [(one, "reset_lora") for one in resets] + [(one, "set_lora") for one in setters]:
        if method not in vars(layer):
            raise RuntimeError(f"{layer.__name__} has no {method}: this vLLM is not the one that the CPU fix is for")
    for layer, reset in resets.items():
        layer.reset_lora = reset
    for layer in setters:
        layer.set_lora = noting(layer.set_lora)
