"""LoRA on CPUs that is right for requests without an adapter, and faster.

vLLM 0.32 marks a row without an adapter by index -1 and then uses it as a Python index, so such a row gets the adapter
in the last slot (vllm-project/vllm#48421). It also gathers one copy of the weights per token. Here rows are grouped by
adapter, and rows of none are left alone.

Shapes: N rows, L slots, R rank, H features.
"""

from __future__ import annotations

import types
from collections.abc import Iterator

import torch

_Index = torch.Tensor


def _groups(indices: _Index) -> Iterator[tuple[int, torch.Tensor]]:
    """Each slot in use with its rows."""
    for slot in torch.unique(indices).tolist():
        if slot >= 0:
            yield slot, (indices == slot).nonzero()[:, 0]


def _weight(stacked: torch.Tensor, slot: int, like: torch.Tensor) -> torch.Tensor:
    weight = stacked[slot]
    return (weight.squeeze(0) if weight.dim() == 3 else weight).to(like.dtype)


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_a_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: _Index,
    scaling: float = 1.0,
) -> None:
    """``output[n] = scaling * A[slot(n)] @ inputs[n]``, zero for rows without a slot; inputs ``[N, H]``."""
    rows = inputs.shape[0]
    output_tensor[:rows].zero_()
    for slot, chosen in _groups(lora_indices_tensor[:rows]):
        a = _weight(lora_a_weights, slot, output_tensor)
        output_tensor[chosen, : a.shape[0]] = scaling * (inputs[chosen].to(output_tensor.dtype) @ a.t())


def bgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: _Index,
    add_inputs: bool = True,
) -> None:
    """``output[n] += B[slot(n)] @ inputs[n]``; inputs ``[N, R]``."""
    rows = inputs.shape[0]
    if not add_inputs:
        output_tensor[:rows].zero_()
    for slot, chosen in _groups(lora_indices_tensor[:rows]):
        b = _weight(lora_b_weights, slot, output_tensor)
        width = min(b.shape[0], output_tensor.shape[1])  # vocabularies are padded to different widths
        output_tensor[chosen, :width] += (inputs[chosen].to(output_tensor.dtype) @ b.t())[:, :width]


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: _Index,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """`bgmv_expand` into some of the columns."""
    part = output_tensor[:, slice_offset : slice_offset + slice_size]
    bgmv_expand(inputs, lora_b_weights, part, lora_indices_tensor, add_inputs)


def sgmv_shrink(
    inputs: torch.Tensor,
    lora_a_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: _Index,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    scaling: float,
) -> None:
    """`bgmv_shrink` with one slot per run of rows."""
    del b_seq_start_loc, batches, max_seq_length, token_nums
    indices = torch.repeat_interleave(lora_indices_tensor, seq_len_tensor)
    bgmv_shrink(inputs, lora_a_weights, output_tensor, indices, scaling)


def sgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: _Index,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    add_inputs: bool = False,
) -> None:
    """`bgmv_expand` with one slot per run of rows."""
    del b_seq_start_loc, batches, max_seq_length, token_nums
    indices = torch.repeat_interleave(lora_indices_tensor, seq_len_tensor)
    bgmv_expand(inputs, lora_b_weights, output_tensor, indices, add_inputs)


def sgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: _Index,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
) -> None:
    """`bgmv_expand_slice` with one slot per run of rows."""
    del b_seq_start_loc, batches, max_seq_length, token_nums
    indices = torch.repeat_interleave(lora_indices_tensor, seq_len_tensor)
    bgmv_expand_slice(inputs, lora_b_weights, output_tensor, indices, slice_offset, slice_size, add_inputs)


OPERATIONS = (bgmv_shrink, bgmv_expand, bgmv_expand_slice, sgmv_shrink, sgmv_expand, sgmv_expand_slice)


def apply_to(modules: tuple[types.ModuleType, ...]) -> None:
    """Put these in the place of vLLM's own; raises `RuntimeError` when vLLM no longer has them under these names."""
    for module in modules:
        for operation in OPERATIONS:
            if not hasattr(module, operation.__name__):
                raise RuntimeError(
                    f"{module.__name__} has no {operation.__name__}: this vLLM is not the one that the CPU fix is for"
                )
            setattr(module, operation.__name__, operation)
