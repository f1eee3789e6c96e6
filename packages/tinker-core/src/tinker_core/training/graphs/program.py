"""A custom loss, rebuilt from its description with operations out of our own tables, and its run on one datum.

Nothing of the description is executed: a name is a key of a table, an argument a plain value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch

from tinker_core.custom_losses.check import check_custom_loss, output_of
from tinker_core.custom_losses.vocabulary import IDLE_KEYWORDS, canonical
from tinker_core.errors import InvalidCustomLossError
from tinker_core.training.graphs.guards import Guard
from tinker_core.training.graphs.operations import CONTAINERS, DTYPES, FUNCTIONS, METHODS, NUMBERS, Operation
from tinker_core.types import CustomLoss, CustomLossNode, CustomLossOp, GraphArgument

Environment = Mapping[str, Any]
"""Results by the name of their node."""
Argument = Callable[[Environment, torch.device], Any]
"""Makes an argument's value; a device of the graph always means the one that computes."""

_DEVICE_TEXTS = ("cpu", "cuda")
_MAX_POSITIONAL = {"norm": 4, "normalize": 4}
"""Arguments before the one that names a tensor to write to."""
_ON_PLAIN_VALUES = frozenset({"eq", "ne", "add"})
"""Operators that tuples and types take too."""


@attrs.frozen(kw_only=True, eq=False)
class Step:
    """One operation of a program."""

    node: CustomLossNode
    operation: Operation
    base_name: str
    """The last part of the operation's name."""
    args: tuple[Argument, ...]
    kwargs: Mapping[str, Argument]

    def run(self, environment: Environment, device: torch.device, guard: Guard) -> Any:  # noqa: ANN401 - any result
        """The result; raises `InvalidCustomLossError` for whatever goes wrong, naming the node."""
        try:
            args = [argument(environment, device) for argument in self.args]
            kwargs = {key: argument(environment, device) for key, argument in self.kwargs.items()}
            self._check_kinds(args)
            guard.before(self.base_name, args, kwargs)
            result = self.operation(*args, **kwargs)
            guard.after(result)
        except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
            raise
        except Exception as error:  # the user's own mistake, in their own graph
            raise node_error(self.node, error) from error
        return result

    def _check_kinds(self, args: Sequence[Any]) -> None:
        """Python's operators repeat texts and tuples, and torch's functions may write where an argument says."""
        if len(args) > _MAX_POSITIONAL.get(self.base_name, len(args)) or (
            self.node.op is CustomLossOp.CALL_FUNCTION
            and ".functional." in self.node.target
            and any(argument is True for argument in args)
        ):
            raise TypeError("flags and results must be given by name")
        if self.node.op is CustomLossOp.CALL_METHOD:
            if not (args and isinstance(args[0], torch.Tensor)):
                raise TypeError("only tensors have methods")
        elif self.node.target.split(".")[0] in ("operator", "_operator") and self.base_name != "getitem":
            plain = self.base_name in _ON_PLAIN_VALUES
            numeric = (torch.Tensor, *NUMBERS)
            for argument in args:
                if not isinstance(argument, numeric) and not (
                    plain and isinstance(argument, (*CONTAINERS, torch.dtype, torch.device))
                ):
                    raise TypeError(f"{self.base_name} is not offered for {type(argument).__name__}")


class Program:
    """A checked loss, ready to run. Raises `InvalidCustomLossError` when made of a graph that is not allowed."""

    def __init__(self, loss: CustomLoss) -> None:
        check_custom_loss(loss)
        self.loss = loss
        self._inputs = [node.name for node in loss.nodes[: len(loss.inputs)]]
        self._steps = [_step(node) for node in loss.nodes[len(loss.inputs) : -1]]
        self._output = loss.nodes[-1]
        loss_ref, metrics = output_of(loss)
        self._loss_name = _name_of(loss_ref)
        self._metrics = {key: _name_of(value) for key, value in metrics.items()}

    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """Scalar loss and metrics of one datum, whose inputs come in the order of the loss's own."""
        logprobs = inputs[0]
        environment: dict[str, Any] = dict(zip(self._inputs, inputs, strict=True))
        guard = Guard(logprobs.numel())
        elsewhere = logprobs.device.type != "cpu"
        with torch.device(logprobs.device) if elsewhere else contextlib.nullcontext():
            for step in self._steps:
                environment[step.node.name] = step.run(environment, logprobs.device, guard)
        return self._scalar(environment[self._loss_name]), {
            key: self._number(key, environment[name]) for key, name in self._metrics.items()
        }

    def _scalar(self, value: Any) -> torch.Tensor:  # noqa: ANN401 - whatever the graph made
        if not isinstance(value, torch.Tensor):
            raise node_error(self._output, f"the loss must be a tensor, got {type(value).__name__}")
        if value.dim() != 0 or not value.is_floating_point():
            raise node_error(
                self._output, f"the loss must be a scalar of floats, got shape {list(value.shape)} of {value.dtype}"
            )
        return value

    def _number(self, key: str, value: Any) -> float:  # noqa: ANN401 - whatever the graph made
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return float(value.detach())
        if isinstance(value, NUMBERS):
            return float(value)
        raise node_error(self._output, f"metric {key!r} must be a scalar")

    def error_in_backward(self, error: Exception) -> InvalidCustomLossError:
        """What to tell of an exception that came up in the backward pass."""
        return node_error(self._output, f"its gradient cannot be computed: {error}")


def node_error(node: CustomLossNode, reason: object) -> InvalidCustomLossError:
    """An error at a node."""
    text = str(reason).split("\n", 1)[0][:400]
    return InvalidCustomLossError(f"node {node.name!r} ({node.target}): {text}")


def _name_of(reference: GraphArgument) -> str:
    assert isinstance(reference, dict)
    return str(reference["ref"])


def _step(node: CustomLossNode) -> Step:
    name = canonical(node.target)
    table = METHODS if node.op is CustomLossOp.CALL_METHOD else FUNCTIONS
    return Step(
        node=node,
        operation=table[name],
        base_name=name.rsplit(".", 1)[-1],
        args=tuple(_argument(argument) for argument in node.args),
        kwargs={key: _argument(value) for key, value in node.kwargs.items() if key not in IDLE_KEYWORDS},
    )


def _constant(value: Any) -> Argument:  # noqa: ANN401 - any literal
    return lambda environment, device: value


def _on_device(environment: Environment, device: torch.device) -> torch.device:
    return device


def _argument(described: GraphArgument) -> Argument:
    """How to make a checked argument's value."""
    if isinstance(described, list):
        return _sequence(described, list)
    if isinstance(described, str) and described.startswith(_DEVICE_TEXTS):
        return _on_device
    if not isinstance(described, dict):
        return _constant(described)
    kind, value = next(iter(described.items()))
    match kind:
        case "ref":
            return lambda environment, device: environment[value]
        case "tuple":
            return _sequence(value, tuple)
        case "slice":
            return _sequence(value, lambda parts: slice(*parts))
        case "ellipsis":
            return _constant(Ellipsis)
        case "float":
            return _constant(float(value))
        case "dtype":
            return _constant(DTYPES[value])
        case "device":
            return _on_device
    return _constant(None)  # a layout or memory format, of which only the usual ones pass the check


def _sequence(described: Sequence[GraphArgument], make: Callable[[Any], Any]) -> Argument:
    items = [_argument(item) for item in described]
    return lambda environment, device: make([item(environment, device) for item in items])
