"""Bounds on what one operation of a custom loss may make or do, checked before it runs.

A graph comes from outside: it must not exhaust memory or time, and must not reach what ends the process (an index out
of range on a GPU, an integer division that traps).  Every operation counts the elements that it reads and makes; both
the count of one datum and the size of one tensor may grow with the datum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tinker_core.training.graphs.operations import CONTAINERS, DTYPES, NUMBERS
from tinker_core.training.graphs.sizes import argument, axes_taken, most_elements, selection_size, tensors_in

MAX_AXES = 8
TENSOR_BASE, TENSOR_PER_CELL = 2**20, 8
"""Elements of one tensor: so many, and so many more per logprob of the datum."""
WORK_BASE, WORK_PER_CELL = 2**22, 1024
"""Elements that one datum's run may read and make, in the same terms."""
_MAX_ITEMS = 4096
_PRODUCTS = frozenset({"matmul", "mm", "mv"})
_DIVISIONS = frozenset({"floordiv", "mod", "floor_divide", "remainder", "fmod", "div", "divide"})
_INDEXED = frozenset({"gather", "index_select", "take_along_dim"})
_DTYPES = frozenset(DTYPES.values())
_WORK_OF_PRODUCT = 8
"""Multiplications that count as much as one element."""

Values = Sequence[Any]
Keywords = Mapping[str, Any]


class Guard:
    """Watches one run of a graph; raises `ValueError` or `TypeError` with the reason."""

    def __init__(self, num_cells: int) -> None:
        self._tensor_limit = TENSOR_BASE + TENSOR_PER_CELL * num_cells
        self._work_limit = WORK_BASE + WORK_PER_CELL * num_cells
        self._work = 0

    def before(self, name: str, args: Values, kwargs: Keywords) -> None:
        """Check an operation, by the last part of its name, with its arguments."""
        tensors = list(tensors_in([*args, *kwargs.values()]))
        self._count(sum(tensor.numel() for tensor in tensors))
        if name == "getitem":
            self._before_getitem(args)
            return
        size = most_elements(name, args, kwargs, tensors)
        self._check_size(size)
        if name in _PRODUCTS:
            self._count(size * args[0].shape[-1] // _WORK_OF_PRODUCT if args[0].dim() else 0)
        elif name in _INDEXED:
            _check_index(name, args, kwargs)
        elif name in _DIVISIONS:
            _check_division(name, args, kwargs)

    def after(self, result: Any) -> None:  # noqa: ANN401 - whatever an operation returned
        """Check what came out."""
        if isinstance(result, torch.Tensor):
            if result.layout is not torch.strided or result.dtype not in _DTYPES or result.dim() > MAX_AXES:
                raise TypeError(f"makes a tensor of type {result.dtype} with {result.dim()} axes; at most {MAX_AXES}")
            self._check_size(result.numel())
            self._count(result.numel())
        elif isinstance(result, CONTAINERS):
            if len(result) > _MAX_ITEMS:
                raise ValueError(f"makes {len(result)} items; at most {_MAX_ITEMS} are allowed")
            for item in result:
                self.after(item)
        elif isinstance(result, int) and abs(result) > 2**63:
            raise ValueError("makes an integer beyond 64 bits")
        elif not isinstance(result, (*NUMBERS, torch.dtype, torch.device)):
            raise TypeError(f"makes a {type(result).__name__}, which no operation takes")

    def _check_size(self, num_elements: int) -> None:
        if num_elements > self._tensor_limit:
            raise ValueError(f"makes a tensor of {num_elements} elements; at most {self._tensor_limit} for this datum")

    def _count(self, num_elements: int) -> None:
        self._work += num_elements
        if self._work > self._work_limit:
            raise ValueError(f"reads and makes more than {self._work_limit} elements for this datum")

    def _before_getitem(self, args: Values) -> None:
        source, index = args
        items = index if isinstance(index, tuple) else (index,)
        if not isinstance(source, torch.Tensor):
            if not (isinstance(source, CONTAINERS) and isinstance(index, int | slice)):
                raise TypeError("only tensors, and tuples by number, can be indexed")
            return
        axis = 0
        for item in items:
            _check_item(item)
            if isinstance(item, torch.Tensor) and item.dtype is not torch.bool:
                _check_range(item, source.shape[axis] if axis < source.dim() else 0, negative=True)
            axis += axes_taken(item, source, items)
        self._check_size(selection_size(source, items))


def _check_item(item: Any) -> None:  # noqa: ANN401 - an element of an index
    parts = (item.start, item.stop, item.step) if isinstance(item, slice) else (item,)
    numbers = all(part is None or type(part) is int for part in parts)
    if not numbers and not isinstance(item, torch.Tensor) and item is not Ellipsis:
        raise TypeError(f"an index must be of numbers, slices, None, ... and tensors, got {type(item).__name__}")


def _check_index(name: str, args: Values, kwargs: Keywords) -> None:
    """A GPU answers an index out of range by ending the process."""
    source = argument(args, kwargs, 0, "input")
    # gather and index_select take (input, dim, index), take_along_dim takes (input, indices, dim).
    at_dim, at_index = (2, 1) if name == "take_along_dim" else (1, 2)
    dim = argument(args, kwargs, at_dim, "dim")
    index = argument(args, kwargs, at_index, "index", "indices")
    if (
        not isinstance(source, torch.Tensor)
        or not isinstance(index, torch.Tensor)
        or type(dim) not in (int, type(None))
    ):
        raise TypeError(f"{name} needs a tensor, an index and a dim")
    size = source.numel() if dim is None or source.dim() == 0 else source.shape[dim]
    _check_range(index, size, negative=False)


def _check_range(index: torch.Tensor, size: int, *, negative: bool) -> None:
    if index.is_floating_point():
        raise TypeError("an index must be of integers or booleans")
    if index.numel() and (int(index.min()) < (-size if negative else 0) or int(index.max()) >= size):
        raise IndexError(f"an index is out of range for an axis of {size}")


def _check_division(name: str, args: Values, kwargs: Keywords) -> None:
    """Integer division by zero, or of the least integer by -1, ends a process on some processors."""
    if name in ("div", "divide") and kwargs.get("rounding_mode") is None:
        return
    values = [*args, *kwargs.values()]
    if any(isinstance(value, float) or (torch.is_tensor(value) and value.is_floating_point()) for value in values):
        return
    divisors = [value for value in values[1:] if isinstance(value, (*NUMBERS, torch.Tensor))]
    if any(isinstance(value, torch.Tensor) for value in values) and (
        len(divisors) != 1 or isinstance(divisors[0], torch.Tensor) or divisors[0] in (0, -1)
    ):
        raise ValueError("integer tensors can be divided by a positive literal only; convert one side with float()")
