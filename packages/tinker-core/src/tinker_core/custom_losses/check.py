"""Is a traced loss well-formed, within bounds, and made of known operations only? Answered without torch.

What depends on a datum's shapes is left to the run in the trainer.
"""

from __future__ import annotations

import re
import reprlib

from tinker_core.custom_losses.vocabulary import (
    ATTRIBUTES,
    DTYPES,
    FUNCTIONS,
    GETATTR,
    IDLE_KEYWORDS,
    KEYWORDS,
    METHODS,
    TEXTS,
    canonical,
)
from tinker_core.errors import InvalidCustomLossError
from tinker_core.types import CustomLoss, CustomLossNode, CustomLossOp, GraphArgument

MAX_NODES = 512
MAX_INPUTS = 16
MAX_METRICS = 64
MAX_ARGUMENTS = 4096
"""Literals, references and containers of a whole graph."""
MAX_DEPTH = 6
"""Of containers within one argument."""
MAX_INTEGER = 2**53
_MAX_NAME = 128

_INPUT = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_SPECIAL_FLOATS = frozenset({"inf", "-inf", "nan"})
_DEVICES = re.compile(r"(cpu|cuda)(:\d{1,3})?")
_CONSTANTS = {
    "layout": frozenset({"strided"}),
    "memory_format": frozenset({"contiguous_format", "preserve_format"}),
}
_IDLE_WHATEVER_ITS_VALUE = frozenset({"_stacklevel", "copy", "non_blocking", "layout", "memory_format"})
_LEFT_TO_THE_CLIENT = "; a plain function given to forward_backward_custom runs in the client, with all of torch"


def check_custom_loss(loss: CustomLoss) -> None:
    """Raise `InvalidCustomLossError`, naming the node at fault, unless the graph may be kept and run."""
    _Checker(loss).run()


def metric_names(loss: CustomLoss) -> tuple[str, ...]:
    """The metrics that a checked loss returns, in its own order."""
    return tuple(output_of(loss)[1])


def output_of(loss: CustomLoss) -> tuple[GraphArgument, dict[str, GraphArgument]]:
    """(loss, metrics) of a checked graph, each a reference."""
    found = loss.nodes[-1].args[0]
    pair = found["tuple"] if isinstance(found, dict) else found
    assert isinstance(pair, list)
    metrics = pair[1]["dict"]
    assert isinstance(metrics, dict)
    return pair[0], metrics


class _Checker:
    def __init__(self, loss: CustomLoss) -> None:
        self._loss = loss
        self._seen: set[str] = set()
        self._num_arguments = 0

    def run(self) -> None:
        loss = self._loss
        if len(loss.name) > _MAX_NAME:
            raise InvalidCustomLossError(f"its name has {len(loss.name)} characters; at most {_MAX_NAME} are allowed")
        self._check_inputs()
        if not 2 <= len(loss.nodes) <= MAX_NODES:
            raise InvalidCustomLossError(f"it has {len(loss.nodes)} nodes; 2 to {MAX_NODES} are allowed")
        for index, node in enumerate(loss.nodes):
            self._check_place(index, node)
            self._check_node(node)
            self._seen.add(node.name)
        self._check_output(loss.nodes[-1])

    def _check_inputs(self) -> None:
        inputs = self._loss.inputs
        names = [entry.name for entry in inputs]
        if not names or names[0] != "logprobs" or len(names) > MAX_INPUTS or len(set(names)) != len(names):
            raise InvalidCustomLossError(
                f"its inputs must be logprobs and up to {MAX_INPUTS - 1} others, all different"
            )
        for entry in inputs:
            if not _INPUT.fullmatch(entry.name):
                raise InvalidCustomLossError(f"input {entry.name[:80]!r} must be a lowercase name")
            if entry.rank not in ((1, 2) if entry.name == "logprobs" else (0, 1, 2)):
                raise InvalidCustomLossError(f"input {entry.name!r} has rank {entry.rank}; ranks are 0, 1 and 2")

    def _check_place(self, index: int, node: CustomLossNode) -> None:
        """Placeholders stand first and are the inputs in order; the output stands last."""
        nodes, inputs = self._loss.nodes, self._loss.inputs
        if not node.name or len(node.name) > _MAX_NAME or node.name in self._seen:
            raise InvalidCustomLossError(f"node {node.name[:80]!r}: names must be different, and not empty or endless")
        expected = inputs[index].name if index < len(inputs) else None
        if (node.op is CustomLossOp.PLACEHOLDER) != (expected is not None):
            raise self._error(node, f"the first {len(inputs)} nodes, and only they, must be placeholders")
        if expected is not None and node.target != expected:
            raise self._error(node, f"the placeholder must be of input {expected!r}, not {node.target[:80]!r}")
        if (node.op is CustomLossOp.OUTPUT) != (index == len(nodes) - 1):
            raise self._error(node, "the last node, and only it, must be the output")

    def _check_node(self, node: CustomLossNode) -> None:
        if node.op in (CustomLossOp.GET_ATTR, CustomLossOp.CALL_MODULE):
            raise self._error(node, f"{node.op} of {node.target[:80]!r} is refused: a loss may only read its inputs")
        if node.op is CustomLossOp.CALL_FUNCTION:
            self._check_function(node)
        elif node.op is CustomLossOp.CALL_METHOD and node.target not in METHODS:
            raise self._error(node, f"method {node.target[:80]!r} is not offered{_LEFT_TO_THE_CLIENT}")
        if node.op is CustomLossOp.OUTPUT:
            return
        if node.op is CustomLossOp.PLACEHOLDER and (node.args or node.kwargs):
            raise self._error(node, "inputs have no defaults")
        for argument in node.args:
            self._check_argument(node, argument, 0)
        for key, argument in node.kwargs.items():
            self._check_keyword(node, key, argument)

    def _check_function(self, node: CustomLossNode) -> None:
        if node.target == GETATTR:
            name = node.args[1] if len(node.args) == 2 else None
            if not isinstance(name, str) or name not in ATTRIBUTES or node.kwargs:
                known = ", ".join(sorted(ATTRIBUTES))
                raise self._error(node, f"attribute {str(name)[:80]!r} is not offered; these are: {known}")
        elif canonical(node.target) not in FUNCTIONS:
            raise self._error(node, f"function {node.target[:80]!r} is not offered{_LEFT_TO_THE_CLIENT}")

    def _check_keyword(self, node: CustomLossNode, key: str, argument: GraphArgument) -> None:
        if key in IDLE_KEYWORDS:
            if argument and key not in _IDLE_WHATEVER_ITS_VALUE:
                raise self._error(node, f"{key} must be left out")
        elif key not in KEYWORDS:
            raise self._error(node, f"keyword {key[:80]!r} is not offered")
        self._check_argument(node, argument, 0)

    def _check_argument(self, node: CustomLossNode, argument: GraphArgument, depth: int) -> None:
        self._num_arguments += 1
        if self._num_arguments > MAX_ARGUMENTS or depth > MAX_DEPTH:
            raise self._error(node, f"arguments may nest {MAX_DEPTH} deep and number {MAX_ARGUMENTS} in a graph")
        match argument:
            case None | bool() | float():
                return
            case int():
                if abs(argument) > MAX_INTEGER:
                    raise self._error(node, f"integers must lie within ±2**53, got one of {argument.bit_length()} bits")
            case str():
                attribute = node.op is CustomLossOp.CALL_FUNCTION and node.target == GETATTR
                if not attribute and argument not in TEXTS and not _DEVICES.fullmatch(argument):
                    raise self._error(node, f"text {argument[:80]!r} means nothing to any operation")
            case list():
                for item in argument:
                    self._check_argument(node, item, depth + 1)
            case dict() if len(argument) == 1:
                kind, value = next(iter(argument.items()))
                self._check_tagged(node, kind, value, depth)
            case _:
                raise self._error(node, "an argument is neither a value nor an object of one key")

    def _check_tagged(self, node: CustomLossNode, kind: str, value: object, depth: int) -> None:
        match kind, value:
            case "ref", str():
                if value not in self._seen:
                    raise self._error(node, f"refers to {value[:80]!r}, which is no earlier node")
            case "tuple", list():
                self._check_argument(node, value, depth)
            case "slice", [_, _, _]:
                self._check_argument(node, value, depth)
            case "ellipsis", True:
                return
            case "float", str() if value in _SPECIAL_FLOATS:
                return
            case "dtype", str() if value in DTYPES:
                return
            case "device", str() if _DEVICES.fullmatch(value):
                return
            case (("layout" | "memory_format"), str()) if value in _CONSTANTS[kind]:
                return
            case _:
                raise self._error(node, f"{str(kind)[:80]} of {reprlib.repr(value)} cannot be an argument")

    def _check_output(self, node: CustomLossNode) -> None:
        found = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        pair = found.get("tuple") if isinstance(found, dict) and len(found) == 1 else found
        if not isinstance(pair, list) or len(pair) != 2:
            raise self._error(node, "must return (loss, metrics)")
        loss, metrics = pair
        self._check_reference(node, "the loss", loss)
        values = metrics.get("dict") if isinstance(metrics, dict) and len(metrics) == 1 else None
        if not isinstance(values, dict) or len(values) > MAX_METRICS:
            raise self._error(node, f"metrics must be a dict of at most {MAX_METRICS}")
        for key, value in values.items():
            if not (isinstance(key, str) and _METRIC.fullmatch(key)):
                raise self._error(
                    node, f"metric {str(key)[:80]!r} must be named custom/<name>:sum or custom/<name>:mean"
                )
            self._check_reference(node, f"metric {key!r}", value)
        assert isinstance(loss, dict)
        if loss["ref"] not in self._depending_on_logprobs():
            raise self._error(node, "the loss does not depend on logprobs, so it has no gradient")

    def _check_reference(self, node: CustomLossNode, what: str, value: object) -> None:
        if not (isinstance(value, dict) and list(value) == ["ref"] and value["ref"] in self._seen):
            raise self._error(node, f"{what} must be the result of a node")

    def _depending_on_logprobs(self) -> set[str]:
        found = {self._loss.nodes[0].name}
        for node in self._loss.nodes[1:-1]:
            if any(name in found for name in _references([*node.args, *node.kwargs.values()])):
                found.add(node.name)
        return found

    def _error(self, node: CustomLossNode, reason: str) -> InvalidCustomLossError:
        return InvalidCustomLossError(f"node {node.name[:80]!r}: {reason}")


def _references(argument: GraphArgument) -> list[str]:
    """The names that an argument refers to."""
    if isinstance(argument, list):
        return [name for item in argument for name in _references(item)]
    if not isinstance(argument, dict):
        return []
    if isinstance(name := argument.get("ref"), str):
        return [name]
    return [name for value in argument.values() for name in _references(value)]
