"""Losses as the SDK's own tracer describes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinker.lib.public_interfaces.custom_loss import LossHandle, encode_graph, trace_loss

from tinker_core.types import CustomLoss, CustomLossInput, CustomLossNode, CustomLossOp


def trace(fn: Callable[..., Any], **ranks: Any) -> tuple[LossHandle, CustomLoss]:
    """The SDK's handle, which runs in the client, and the record that the server gets of it."""
    handle = trace_loss(fn, ranks, "session")
    nodes = tuple(
        CustomLossNode(
            op=CustomLossOp(node.op), name=node.name, target=node.target, args=tuple(node.args), kwargs=node.kwargs
        )
        for node in encode_graph(handle).nodes
    )
    inputs = tuple(CustomLossInput(name=entry.name, rank=entry.rank) for entry in handle.inputs)
    return handle, CustomLoss(name=handle.name, inputs=inputs, nodes=nodes)
