"""Custom losses written by hand, for tests without the SDK's tracer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinker_core.types import CustomLoss, CustomLossInput, CustomLossNode, CustomLossOp, GraphArgument

Ref = dict[str, str]
"""A reference to a node, as an argument."""


class GraphBuilder:
    """Collects nodes; every method returns a reference to the node that it adds."""

    def __init__(self, **ranks: int) -> None:
        self._inputs = tuple(CustomLossInput(name=name, rank=rank) for name, rank in ranks.items())
        self.nodes = [CustomLossNode(op=CustomLossOp.PLACEHOLDER, name=name, target=name) for name in ranks]

    def __getitem__(self, name: str) -> Ref:
        return {"ref": name}

    def add(
        self, op: CustomLossOp, target: str, args: tuple[GraphArgument, ...], kwargs: Mapping[str, GraphArgument]
    ) -> Ref:
        """A node of any kind."""
        name = f"node_{len(self.nodes)}"
        self.nodes.append(CustomLossNode(op=op, name=name, target=target, args=args, kwargs=dict(kwargs)))
        return {"ref": name}

    def call(self, target: str, /, *args: GraphArgument, **kwargs: GraphArgument) -> Ref:
        """A function by its qualified name."""
        return self.add(CustomLossOp.CALL_FUNCTION, target, args, kwargs)

    def method(self, target: str, /, *args: GraphArgument, **kwargs: GraphArgument) -> Ref:
        """A method of its first argument."""
        return self.add(CustomLossOp.CALL_METHOD, target, args, kwargs)

    def returns(self, loss: GraphArgument, metrics: Mapping[str, GraphArgument] | None = None) -> CustomLoss:
        """The whole loss."""
        output = {"tuple": [loss, {"dict": dict(metrics or {})}]}
        nodes = (*self.nodes, CustomLossNode(op=CustomLossOp.OUTPUT, name="output", target="output", args=(output,)))
        return CustomLoss(name="sample", inputs=self._inputs, nodes=nodes)


CLIP, SPREAD = 1.5, 0.3


def clipped_policy_loss() -> CustomLoss:
    """``-sum min(p / q, CLIP) A + SPREAD mean (log p - mean log p)^2``: its second part needs the datum as a whole."""
    graph = GraphBuilder(logprobs=1, old=1, advantages=1)
    ratio = graph.call("torch.exp", graph.call("operator.sub", graph["logprobs"], graph["old"]))
    gain = graph.call("operator.mul", graph.call("torch.clamp", ratio, max=CLIP), graph["advantages"])
    centred = graph.call("operator.sub", graph["logprobs"], graph.method("mean", graph["logprobs"]))
    spread = graph.call("operator.mul", graph.method("mean", graph.call("operator.pow", centred, 2)), SPREAD)
    loss = graph.call("operator.sub", spread, graph.method("sum", gain))
    metrics = {"custom/ratio:mean": graph.method("mean", ratio), "custom/gain:sum": graph.method("sum", gain)}
    return graph.returns(loss, metrics)


def clipped_policy_reference(
    logprobs: npt.NDArray[Any], old: npt.NDArray[Any], advantages: npt.NDArray[Any]
) -> tuple[float, npt.NDArray[np.float64], dict[str, float]]:
    """Value, slopes and metrics of `clipped_policy_loss`, in float64."""
    logprobs = logprobs.astype(np.float64)
    ratio = np.exp(logprobs - old)
    gain = np.minimum(ratio, CLIP) * advantages
    centred = logprobs - logprobs.mean()
    slopes = 2 * SPREAD / logprobs.size * centred - np.where(ratio < CLIP, ratio, 0.0) * advantages
    value = SPREAD * np.mean(centred**2) - gain.sum()
    return float(value), slopes, {"custom/ratio:mean": float(ratio.mean()), "custom/gain:sum": float(gain.sum())}
