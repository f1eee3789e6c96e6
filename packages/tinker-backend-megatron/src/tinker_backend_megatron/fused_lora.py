"""A linear that is several linears of the Hugging Face model in one, each with its own LoRA.

Megatron-Core fuses query, key and value (interleaved by key-value head) and gate and up.  A `Section` says where the
features of one of them lie.  As in `tinker_core.training.lora`, backward adds dA and dB to the segments' own rows.

Shapes: x ``[T, in]``, y ``[T, out]``.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from tinker_core.training.adapters import Segment
from tinker_core.training.lora import add_lora, add_lora_gradient


@attrs.frozen(kw_only=True)
class Section:
    """Some features of an axis: the same range out of each of some equal groups."""

    groups: int
    width: int
    """Features of a group."""
    start: int
    stop: int

    def of(self, tensor: torch.Tensor, axis: int = -1) -> torch.Tensor:
        """A view of the features, with the axis as two: groups, and the range."""
        axis %= tensor.dim()
        shape = (*tensor.shape[:axis], self.groups, self.width, *tensor.shape[axis + 1 :])
        return tensor.view(shape).narrow(axis + 1, self.start, self.stop - self.start)

    @property
    def size(self) -> int:
        """Features in all."""
        return self.groups * (self.stop - self.start)


@attrs.frozen(kw_only=True)
class LoraPart:
    """One of the linears that a fused linear consists of."""

    name: str
    """Its qualified name in the Hugging Face model."""
    section: Section


class FusedLoraFunction(torch.autograd.Function):
    """``y = x W' + bias``, plus every segment's update of every part."""

    @staticmethod
    def forward(  # noqa: D102 - torch's contract
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        parts: tuple[LoraPart, ...],
        segments: tuple[Segment, ...],
        tag: torch.Tensor,
    ) -> torch.Tensor:
        del tag
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight, bias)
        downs = add_parts(y, flat, parts, segments)
        ctx.save_for_backward(flat, weight)
        ctx.parts, ctx.segments, ctx.downs, ctx.shape = parts, segments, downs, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401, D102
        flat, weight = ctx.saved_tensors
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad_y.t() @ flat if ctx.needs_input_grad[1] else None
        grad_bias = grad_y.sum(0) if ctx.needs_input_grad[2] else None
        for part, downs in zip(ctx.parts, ctx.downs, strict=True):
            if any(down is not None for down in downs):
                grad = part.section.of(grad_y).flatten(1)
                add_lora_gradient(grad, flat, grad_x, part.name, ctx.segments, downs)
        return (grad_x.view(ctx.shape) if grad_x is not None else None), grad_weight, grad_bias, None, None, None


def add_parts(
    y: torch.Tensor, x: torch.Tensor, parts: tuple[LoraPart, ...], segments: tuple[Segment, ...]
) -> list[list[torch.Tensor | None]]:
    """Add all updates to ``y`` in place; returns ``x A'`` by part and segment."""
    found = []
    for part in parts:
        target = part.section.of(y)
        if part.section.groups == 1:
            found.append(add_lora(target[:, 0], x, part.name, segments))
            continue
        if not any(one.weights is not None and part.name in one.weights.views for one in segments):
            found.append([None] * len(segments))
            continue
        update = y.new_zeros(y.shape[0], part.section.size)
        found.append(add_lora(update, x, part.name, segments))
        target += update.view(target.shape)
    return found


def fused_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    parts: tuple[LoraPart, ...],
    segments: tuple[Segment, ...],
    tag: torch.Tensor,
) -> torch.Tensor:
    """The linear with all updates, with or without autograd."""
    if torch.is_grad_enabled() and segments:
        result: torch.Tensor = FusedLoraFunction.apply(x, weight, bias, parts, segments, tag)  # type: ignore[no-untyped-call]
        return result
    y = F.linear(x, weight, bias)
    add_parts(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), parts, segments)
    return y
