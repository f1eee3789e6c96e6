"""A loss that a client traced with ``torch.fx``, as plain data; nothing in it can be executed.

Arguments of nodes are in the SDK's own form: JSON scalars and lists stand for themselves, anything else is an object of
one key: ``{"ref": name}`` for an earlier node, ``{"tuple": [...]}``, ``{"dict": {...}}``,
``{"slice": [start, stop, step]}``, ``{"ellipsis": true}``, ``{"float": "inf"}`` (also ``"-inf"`` and ``"nan"``), and
``dtype``, ``device``, ``layout`` or ``memory_format`` with a name.
"""

from __future__ import annotations

import attrs

from tinker_core.types.enums import CustomLossOp

GraphArgument = object
"""An argument of a node, as described above."""

CUSTOM_LOSS = "custom"
"""The ``loss_fn`` of passes that name a custom loss by its ``loss_id``."""


@attrs.frozen(kw_only=True)
class CustomLossInput:
    """One input of a custom loss: ``logprobs``, or a key of ``loss_fn_inputs``."""

    name: str
    rank: int
    """Axes that every datum's value has: 0 is a scalar, 1 is ``[T]``, 2 is ``[T, K]``."""


@attrs.frozen(kw_only=True)
class CustomLossNode:
    """One step of a traced loss."""

    op: CustomLossOp
    name: str
    """Unique within the graph; later nodes refer to this one by it."""
    target: str
    """The input (placeholder), the function's qualified name, the method, or ``output``."""
    args: tuple[GraphArgument, ...] = ()
    kwargs: dict[str, GraphArgument] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class CustomLoss:
    """A whole traced loss: it runs once per datum, and the losses of the data add up."""

    name: str
    inputs: tuple[CustomLossInput, ...]
    """``logprobs`` first, in the shape of the datum's target_tokens; then what the loss reads."""
    nodes: tuple[CustomLossNode, ...]
    """In order of execution; the last one is the output: ``(loss, metrics)``."""
