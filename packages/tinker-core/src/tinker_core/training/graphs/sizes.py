"""How many elements an operation would make at most, found from its arguments alone.

For most operations that is what their tensors broadcast to; the others have a rule of their own.  (torch could tell
by a run on its meta device, but the first such run imports so much that training would stand still for seconds.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tinker_core.training.graphs.operations import CONTAINERS

Values = Sequence[Any]
Keywords = Mapping[str, Any]


def most_elements(name: str, args: Values, kwargs: Keywords, tensors: Sequence[torch.Tensor]) -> int:
    """Elements of the result at most, for an operation by the last part of its name; ``tensors`` are its arguments'.

    Raises `TypeError` for arguments in a form that it cannot tell from.
    """
    rule = _RULES.get(name)
    if rule is not None:
        return rule(args, kwargs)
    return broadcast_size(tensors)


def tensors_in(values: Values) -> Iterator[torch.Tensor]:
    """All tensors among values, in tuples and lists too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, CONTAINERS):
            yield from tensors_in(value)


def broadcast_size(tensors: Sequence[torch.Tensor]) -> int:
    """Elements of what tensors broadcast to; more than that if they do not fit."""
    if not tensors:
        return 0
    shape = tensors[0].shape
    if all(tensor.shape == shape for tensor in tensors[1:]):
        return tensors[0].numel()
    return _joint_size([tuple(tensor.shape) for tensor in tensors])


def _joint_size(shapes: Sequence[tuple[int, ...]]) -> int:
    size = 1
    for axis in range(1, max(map(len, shapes)) + 1):
        size *= max(shape[-axis] if axis <= len(shape) else 1 for shape in shapes)
    return size


def selection_size(source: torch.Tensor, items: Values) -> int:
    """Elements of ``source[items]`` at most. A mask selects no more than it has elements."""
    chosen: list[tuple[int, ...]] = []
    kept = 1
    axis = 0
    for item in items:
        taken = axes_taken(item, source, items)
        if isinstance(item, torch.Tensor):
            chosen.append((item.numel(),) if item.dtype is torch.bool else tuple(item.shape))
        elif not isinstance(item, int):
            kept *= math.prod(source.shape[axis : axis + taken])
        axis += taken
    return (_joint_size(chosen) if chosen else 1) * kept * math.prod(source.shape[axis:])


def axes_taken(item: Any, source: torch.Tensor, items: Values) -> int:  # noqa: ANN401 - an element of an index
    """Axes of the source that an element of an index speaks of."""
    if item is None:
        return 0
    if item is Ellipsis:
        return source.dim() - sum(axes_taken(other, source, items) for other in items if other is not Ellipsis)
    if isinstance(item, torch.Tensor) and item.dtype is torch.bool:
        return item.dim()
    return 1


def argument(args: Values, kwargs: Keywords, index: int, *names: str) -> Any:  # noqa: ANN401 - whatever was passed
    """An argument by its place or by one of its names; None when it was not passed."""
    if index < len(args):
        return args[index]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _tensor(args: Values, kwargs: Keywords, index: int, *names: str) -> torch.Tensor:
    found = argument(args, kwargs, index, *names)
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"argument {index + 1} must be a tensor, got {type(found).__name__}")
    return found


def _integers(value: Any) -> list[int]:  # noqa: ANN401 - whatever was passed as a size
    items = list(value) if isinstance(value, CONTAINERS) else [value]
    if not all(type(item) is int for item in items):
        raise TypeError("sizes must be integers")
    return items


def _sizes(args: Values, kwargs: Keywords, index: int, *names: str) -> list[int]:
    """Sizes that are passed as one tuple or one by one."""
    if index < len(args) and not isinstance(args[index], CONTAINERS):
        return _integers(list(args[index:]))
    return _integers(argument(args, kwargs, index, *names))


def _product(sizes: Sequence[int]) -> int:
    return math.prod(max(size, 0) for size in sizes)


def _made(args: Values, kwargs: Keywords) -> int:
    return _product(_sizes(args, kwargs, 0, "size", "sizes"))


def _new(args: Values, kwargs: Keywords) -> int:
    return _product(_sizes(args, kwargs, 1, "size", "sizes"))


def _full(args: Values, kwargs: Keywords) -> int:
    return _product(_integers(argument(args, kwargs, 0, "size")))


def _new_full(args: Values, kwargs: Keywords) -> int:
    return _product(_integers(argument(args, kwargs, 1, "size")))


def _arange(args: Values, kwargs: Keywords) -> int:
    bounds = [*args, *(kwargs[name] for name in ("start", "end", "step") if name in kwargs)]
    if not all(isinstance(bound, int | float) and math.isfinite(bound) for bound in bounds):
        raise TypeError("bounds must be finite numbers")
    start, end, step = (float(bound) for bound in ((0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1)[:3]))
    return max(0, math.ceil((end - start) / step))


def _linspace(args: Values, kwargs: Keywords) -> int:
    (steps,) = _integers(argument(args, kwargs, 2, "steps"))
    return steps


def _eye(args: Values, kwargs: Keywords) -> int:
    (rows,) = _integers(argument(args, kwargs, 0, "n"))
    columns = argument(args, kwargs, 1, "m")
    return _product([rows, rows if columns is None else _integers(columns)[0]])


def _repeated(args: Values, kwargs: Keywords) -> int:
    return _tensor(args, kwargs, 0, "input").numel() * _product(_sizes(args, kwargs, 1, "repeats", "dims"))


def _repeat_interleave(args: Values, kwargs: Keywords) -> int:
    (times,) = _integers(argument(args, kwargs, 1, "repeats"))
    return _tensor(args, kwargs, 0, "input").numel() * max(times, 0)


def _padded(args: Values, kwargs: Keywords) -> int:
    shape = list(_tensor(args, kwargs, 0, "input").shape)
    amounts = _integers(argument(args, kwargs, 1, "pad"))
    for place in range(min(len(amounts) // 2, len(shape))):
        shape[-1 - place] += amounts[2 * place] + amounts[2 * place + 1]
    return _product(shape)


def _joined(args: Values, kwargs: Keywords) -> int:
    return sum(tensor.numel() for tensor in tensors_in([*args, *kwargs.values()]))


def _outer(args: Values, kwargs: Keywords) -> int:
    return math.prod(tensor.numel() for tensor in tensors_in([*args, *kwargs.values()]))


def _matrix_product(args: Values, kwargs: Keywords) -> int:
    first, second = _tensor(args, kwargs, 0, "input"), _tensor(args, kwargs, 1, "other", "mat2", "vec")
    if first.dim() > 2 or second.dim() > 2:
        raise TypeError("products are offered for tensors of one or two axes")
    return (first.shape[0] if first.dim() == 2 else 1) * (second.shape[1] if second.dim() == 2 else 1)


def _quantiles(args: Values, kwargs: Keywords) -> int:
    q = argument(args, kwargs, 1, "q")
    number = q.numel() if isinstance(q, torch.Tensor) else 1
    return _tensor(args, kwargs, 0, "input").numel() * max(number, 1)


def _gathered(args: Values, kwargs: Keywords) -> int:
    return _tensor(args, kwargs, 2, "index").numel()


def _index_selected(args: Values, kwargs: Keywords) -> int:
    source, index = _tensor(args, kwargs, 0, "input"), _tensor(args, kwargs, 2, "index")
    (dim,) = _integers(argument(args, kwargs, 1, "dim"))
    along = source.shape[dim] if source.dim() else 1
    return source.numel() // max(along, 1) * index.numel()


_RULES: dict[str, Callable[[Values, Keywords], int]] = {
    **dict.fromkeys(("zeros", "ones"), _made),
    **dict.fromkeys(("new_zeros", "new_ones"), _new),
    "full": _full,
    "new_full": _new_full,
    "arange": _arange,
    "linspace": _linspace,
    "eye": _eye,
    **dict.fromkeys(("repeat", "tile"), _repeated),
    "repeat_interleave": _repeat_interleave,
    "pad": _padded,
    **dict.fromkeys(("stack", "cat", "concat", "hstack", "vstack"), _joined),
    "outer": _outer,
    **dict.fromkeys(("matmul", "mm", "mv"), _matrix_product),
    **dict.fromkeys(("quantile", "nanquantile"), _quantiles),
    "gather": _gathered,
    "index_select": _index_selected,
}
