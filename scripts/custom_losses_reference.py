"""The page docs/reference/custom-losses.md: what a loss that clients send to the server may do."""

from __future__ import annotations

from collections.abc import Iterable

from tinker_core.custom_losses import check, vocabulary
from tinker_core.engine.admission import MAX_LOSSES
from tinker_core.training.graphs import guards

INTRODUCTION = f"""# Custom losses

`ServiceClient.create_custom_loss` traces a loss with `torch.fx` and sends the graph; `forward_backward_custom` with its
handle then runs the loss inside the server's own pass, once per datum, and adds up: one pass instead of the two that
the SDK makes when it computes a loss itself. Numbers, metrics and gradients are the same. A plain function given to
`forward_backward_custom` always runs in the client, with all of torch; so does a handle if the server is started with
`--client-side-losses`, or while its trainer runs no custom losses.

The graph is data. The server rebuilds it from the operations below, looked up by name in tables of its own; there is
no way from a name in a graph to anything else. A graph that names another operation is refused when it is created,
and the error names the node. An operation that fails at run time, or a result that is not a finite scalar, is an error
of its own request only.

Devices in a graph mean the one that computes. Integer tensors can be divided by positive literals only. Keywords that
write to a given place or work in place are refused.

## Bounds

| what | bound |
| --- | --- |
| losses of a session | {MAX_LOSSES} |
| nodes of a graph | {check.MAX_NODES} |
| arguments in a graph | {check.MAX_ARGUMENTS}, nested {check.MAX_DEPTH} deep |
| inputs, metrics | {check.MAX_INPUTS}, {check.MAX_METRICS} |
| integers | ±2^53 |
| axes of a tensor | {guards.MAX_AXES} |
| elements of a tensor | {guards.TENSOR_BASE:,} + {guards.TENSOR_PER_CELL} per logprob of the datum |
| elements read and made in all | {guards.WORK_BASE:,} + {guards.WORK_PER_CELL:,} per logprob of the datum |
"""


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, "## Operations", ""]
    groups: dict[str, Iterable[str]] = {
        "`torch`": vocabulary.TORCH,
        "`torch.special`": vocabulary.SPECIAL,
        "`torch.nn.functional`": vocabulary.FUNCTIONAL - {"log_sigmoid"},
        "`torch.linalg`": vocabulary.LINALG,
        "`math`, of numbers and tensors of one element": vocabulary.MATH,
        "Python's operators, by their names in `operator`": vocabulary.OPERATORS,
        "methods": vocabulary.METHODS,
        "attributes": vocabulary.ATTRIBUTES,
        "element types": vocabulary.DTYPES,
    }
    for title, names in groups.items():
        lines += [f"**{title}**: {', '.join(f'`{name}`' for name in sorted(names))}", ""]
    return "\n".join(lines)
