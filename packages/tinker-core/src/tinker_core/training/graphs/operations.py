"""The operations of the vocabulary as torch has them. A name from outside is only ever looked up in these tables."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional

from tinker_core.custom_losses import vocabulary

Operation = Callable[..., Any]

NUMBERS = (bool, int, float)
"""Types of Python values that graphs compute with."""


def _number(value: Any) -> float | int:  # noqa: ANN401 - whatever a graph passes
    """What ``math`` takes: a number, or a tensor of one element, whose gradient ends here as it does in Python."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"math needs one number, got a tensor of shape {list(value.shape)}; use torch instead")
        return float(value.detach())
    if not isinstance(value, NUMBERS):
        raise TypeError(f"math needs a number, got {type(value).__name__}")
    return value


def _on_numbers(function: Operation) -> Operation:
    def run(*values: Any) -> float | int | bool:  # noqa: ANN401 - whatever a graph passes
        result: float | int | bool = function(*(_number(value) for value in values))
        return result

    return run


def _pow(base: Any, exponent: Any) -> Any:  # noqa: ANN401 - numbers or tensors
    """``operator.pow`` without integers that grow for hours."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent * max(base.bit_length(), 1) > 64:
        raise ValueError("the power of two integers is too large; use floats")
    return operator.pow(base, exponent)


def _to(tensor: torch.Tensor, *wanted: Any, dtype: torch.dtype | None = None, **devices: Any) -> torch.Tensor:  # noqa: ANN401
    """Conversion to another element type. Tensors stay on their device, whichever the client had in mind."""
    for argument in (*wanted, *devices.values()):
        if isinstance(argument, torch.Tensor):
            dtype = argument.dtype
        elif isinstance(argument, torch.dtype):
            dtype = argument
    return tensor if dtype is None else tensor.to(dtype)


def _where(condition: torch.Tensor, chosen: Any, other: Any) -> torch.Tensor:  # noqa: ANN401 - numbers or tensors
    return torch.where(condition, chosen, other)


def _where_method(chosen: torch.Tensor, condition: torch.Tensor, other: Any) -> torch.Tensor:  # noqa: ANN401
    return torch.where(condition, chosen, other)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _functions() -> dict[str, Operation]:
    found: dict[str, Operation] = {}
    for module, prefix, names in (
        (torch, "torch", vocabulary.TORCH),
        (torch.special, "torch.special", vocabulary.SPECIAL),
        (functional, "torch.nn.functional", vocabulary.FUNCTIONAL - {"log_sigmoid"}),
        (torch.linalg, "torch.linalg", vocabulary.LINALG),
        (operator, "operator", vocabulary.OPERATORS),
    ):
        found.update({f"{prefix}.{name}": getattr(module, name) for name in names})
    found.update({f"math.{name}": _on_numbers(getattr(math, name)) for name in vocabulary.MATH})
    found["torch.nn.functional.log_sigmoid"] = functional.logsigmoid  # the name of its implementation in C
    found["torch.sgn"] = torch.sign  # the same for real numbers; the gradient of sgn makes torch import its compiler
    found["operator.pow"] = _pow
    found["torch.where"] = _where
    return found


def _methods() -> dict[str, Operation]:
    found: dict[str, Operation] = {name: getattr(torch.Tensor, name, _same) for name in vocabulary.METHODS}
    # Memory that is laid out in another way than the client's would make `view` fail here and not there.
    found |= {"view": torch.Tensor.reshape, "view_as": torch.Tensor.reshape_as}
    found["sgn"] = torch.Tensor.sign
    found |= {"to": _to, "type": _to, "type_as": _to, "cpu": _same, "where": _where_method}
    return found


def _attribute(tensor: torch.Tensor, name: str) -> Any:  # noqa: ANN401 - depends on the name
    return _ATTRIBUTES[name](tensor)


def _of_pair(index: int) -> Operation:
    def read(pair: Any) -> Any:  # noqa: ANN401 - torch's (values, indices)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError("only the result of an operation such as max(dim) has values and indices")
        return pair[index]

    return read


_ATTRIBUTES: dict[str, Operation] = {
    "shape": lambda tensor: tuple(tensor.shape),
    "ndim": lambda tensor: tensor.ndim,
    "dtype": lambda tensor: tensor.dtype,
    "device": lambda tensor: tensor.device,
    "T": lambda tensor: tensor.T,
    "mT": lambda tensor: tensor.mT,
    "data": lambda tensor: tensor.detach(),
    "values": _of_pair(0),
    "indices": _of_pair(1),
}

FUNCTIONS: dict[str, Operation] = {**_functions(), vocabulary.GETATTR: _attribute}
"""Functions by canonical name."""
METHODS: dict[str, Operation] = _methods()
"""Methods by name; the tensor is the first argument."""
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in vocabulary.DTYPES}
"""Element types by name."""
CONTAINERS = (tuple, list)
"""Types of Python containers that graphs handle."""
