"""A linear layer that serves several LoRA adapters in one packed pass.

One base matrix product for all tokens, then one low-rank update per segment.  Backward adds dA and dB in place to the
segment's own gradient row, so autograd never sees adapter parameters and co-tenants share everything but their rows.

Shapes: x ``[..., T, in]`` with all leading axes of size 1; segments index T.
"""

from __future__ import annotations

from typing import Any

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


class MultiLoraFunction(torch.autograd.Function):
    """``y = x W' + bias``, plus ``scale * (x A') B'`` on each segment."""

    @staticmethod
    def forward(  # noqa: D102 - torch's contract
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        name: str,
        segments: tuple[Segment, ...],
        tag: torch.Tensor,
    ) -> torch.Tensor:
        del tag
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight, bias)
        downs = add_lora(y, flat, name, segments)
        ctx.save_for_backward(flat, weight)
        ctx.name, ctx.segments, ctx.downs, ctx.shape = name, segments, downs, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401, D102
        flat, weight = ctx.saved_tensors
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        add_lora_gradient(grad_y, flat, grad_x, ctx.name, ctx.segments, ctx.downs)
        return (grad_x.view(ctx.shape) if grad_x is not None else None), None, None, None, None, None


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

    lora_name: str
    lora_context: LoraContext

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer plus the updates of the context's segments."""
        segments = self.lora_context.segments
        if not segments:
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            tag = self.lora_context.tag
            result: torch.Tensor = MultiLoraFunction.apply(  # type: ignore[no-untyped-call]
                x, self.weight, self.bias, self.lora_name, segments, tag
            )
            return result
        y = F.linear(x, self.weight, self.bias)
        add_lora(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.lora_name, segments)
        return y


def install_lora(model: nn.Module, targets: frozenset[str], context: LoraContext) -> tuple[LinearSpec, ...]:
    """Swap in `MultiLoraLinear` for every linear whose last name segment is in ``targets``; freezes the model."""
    model.requires_grad_(False)
    specs = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.rsplit(".", 1)[-1] in targets:
            module.__class__ = MultiLoraLinear
            module.lora_name = name
            module.lora_context = context  # type: ignore[assignment]
            specs.append(LinearSpec(name=name, in_features=module.in_features, out_features=module.out_features))
    return tuple(specs)
