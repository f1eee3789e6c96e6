"""A linear layer that serves several LoRA adapters in one packed pass.

One base matrix product for all tokens, then one low-rank update per segment.  Backward adds dA and dB in place to the
segment's own gradient row, so autograd never sees adapter parameters and co-tenants share everything but their rows.

A trainer may fuse several linears of the Hugging Face model in one, as query, key and value; a `Section` says where the
features of each of these `LoraPart` lie, and each has its own LoRA.

Shapes: x ``[..., T, in]`` with all leading axes of size 1; segments index T.
"""

from __future__ import annotations

from typing import Any, Self

import attrs
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from tinker_core.training.adapters import LinearSpec, Segment


class LoraContext:
    """The segments of the pass in progress, shared by all linears of one model."""

    def __init__(self) -> None:
        self.segments: tuple[Segment, ...] = ()
        # Makes autograd call backward of the first layer, whose input (the frozen embedding) requires no gradient.
        self.tag = torch.zeros((), requires_grad=True)


@attrs.frozen(kw_only=True)
class Section:
    """Some features of an axis: the same range out of each of some equal groups."""

    groups: int
    width: int
    """Features of a group."""
    start: int
    stop: int

    @classmethod
    def whole(cls, size: int) -> Self:
        """All features."""
        return cls(groups=1, width=size, start=0, stop=size)

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
    """One of the linears that a fused linear consists of; a plain one has one part, which is all of it."""

    name: str
    """Its qualified name in the Hugging Face model."""
    section: Section


class MultiLoraFunction(torch.autograd.Function):
    """``y = x W' + bias``, plus ``scale * (x A') B'`` of every part on each segment."""

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
        downs = _add_parts(y, flat, parts, segments)
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


def multi_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    parts: tuple[LoraPart, ...],
    segments: tuple[Segment, ...],
    tag: torch.Tensor,
) -> torch.Tensor:
    """The linear with all updates, with or without autograd; ``tag`` is `LoraContext.tag`."""
    if torch.is_grad_enabled() and segments:
        result: torch.Tensor = MultiLoraFunction.apply(x, weight, bias, parts, segments, tag)  # type: ignore[no-untyped-call]
        return result
    y = F.linear(x, weight, bias)
    if segments:
        _add_parts(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), parts, segments)
    return y


def _add_parts(
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


def add_lora(y: torch.Tensor, x: torch.Tensor, name: str, segments: tuple[Segment, ...]) -> list[torch.Tensor | None]:
    """Add every segment's update to ``y`` ``[T, out]`` in place; returns ``x A'`` per segment, ``[n, rank]``."""
    downs: list[torch.Tensor | None] = []
    for segment in segments:
        if segment.weights is None or name not in segment.weights.views:
            downs.append(None)
            continue
        a, b = segment.weights.views[name]
        down = x[segment.start : segment.end] @ a.t()
        y[segment.start : segment.end].addmm_(down, b.t(), alpha=segment.weights.scale)
        downs.append(down)
    return downs


def add_lora_gradient(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    grad_x: torch.Tensor | None,
    name: str,
    segments: tuple[Segment, ...],
    downs: list[torch.Tensor | None],
) -> None:
    """Add dA and dB to each segment's gradient row and the adapter's share to ``grad_x`` ``[T, in]``, in place."""
    for segment, down in zip(segments, downs, strict=True):
        if segment.weights is None or down is None:
            continue
        a, b = segment.weights.views[name]
        grad = grad_y[segment.start : segment.end]
        grad_down = (grad @ b).mul_(segment.weights.scale)
        if segment.gradient is not None:
            grad_a, grad_b = segment.gradient.views[name]
            grad_b.add_(grad.t() @ down, alpha=segment.weights.scale)
            grad_a.add_(grad_down.t() @ x[segment.start : segment.end])
        if grad_x is not None:
            grad_x[segment.start : segment.end].addmm_(grad_down, a)


class MultiLoraLinear(nn.Linear):
    """``nn.Linear`` whose class is swapped in place on a loaded model; the base weight stays where it is, frozen."""

    lora_parts: tuple[LoraPart, ...]
    lora_context: LoraContext

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer plus the updates of the context's segments."""
        context = self.lora_context
        return multi_lora_linear(x, self.weight, self.bias, self.lora_parts, context.segments, context.tag)


def install_lora(model: nn.Module, targets: frozenset[str], context: LoraContext) -> tuple[LinearSpec, ...]:
    """Swap in `MultiLoraLinear` for every linear whose last name segment is in ``targets``; freezes the model."""
    model.requires_grad_(False)
    specs = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.rsplit(".", 1)[-1] in targets:
            module.__class__ = MultiLoraLinear
            module.lora_parts = (LoraPart(name=name, section=Section.whole(module.out_features)),)  # type: ignore[assignment]
            module.lora_context = context  # type: ignore[assignment]
            specs.append(LinearSpec(name=name, in_features=module.in_features, out_features=module.out_features))
    return tuple(specs)
