"""The target cells of a datum: one entry per (position, target token) that its loss looks at.

1-D targets have one cell per position, ``[T, K]`` soft targets K, and CSR targets those that are stored.  A cell that
CSR leaves out holds token 0; it matters only where another input (a weight) is not zero, and is then added here.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np
import numpy.typing as npt

from tinker_core.types import TensorData

TARGETS = "target_tokens"
"""The loss input that every loss needs."""

IntArray = npt.NDArray[np.int64]


@attrs.frozen(kw_only=True, eq=False)
class TargetCells:
    """Cells of one datum in order of position; N counts them."""

    positions: IntArray
    """Position in the model input, int64 ``[N]``, rising."""
    inputs: Mapping[str, npt.NDArray[np.generic]]
    """Loss inputs per cell ``[N]``: int64 ``target_tokens``, all others float32."""
    reported: IntArray | None
    """Cells whose logprobs are reported, in the order of the target's stored elements; None means all in order."""


def target_cells(inputs: Mapping[str, TensorData]) -> TargetCells:
    """Cells of a datum's (already validated) loss inputs, of which ``target_tokens`` is one."""
    target = inputs[TARGETS]
    if any(tensor.is_sparse for tensor in inputs.values()):
        return _sparse_cells(inputs)
    length = target.shape[0]
    per_position = target.shape[1] if len(target.shape) == 2 else 1
    flat = {name: _typed(name, tensor.data) for name, tensor in inputs.items()}
    positions = np.repeat(np.arange(length, dtype=np.int64), per_position)
    return TargetCells(positions=positions, inputs=flat, reported=None)


def _sparse_cells(inputs: Mapping[str, TensorData]) -> TargetCells:
    target = inputs[TARGETS]
    width = target.shape[1]
    size = target.shape[0] * width
    target_keys = _stored_keys(target)
    if target.is_sparse:
        others = [_nonzero_keys(tensor) for name, tensor in inputs.items() if name != TARGETS]
        # Without any other input every cell counts as much as the next, those of token 0 too.
        keys = np.unique(np.concatenate([target_keys, *(others or [np.arange(size, dtype=np.int64)])]))
        reported = np.searchsorted(keys, target_keys)
    else:
        keys, reported = target_keys, None
    values = {name: _typed(name, _lookup(tensor, keys)) for name, tensor in inputs.items()}
    return TargetCells(positions=keys // max(width, 1), inputs=values, reported=reported)


def _stored_keys(tensor: TensorData) -> IntArray:
    """``row * width + column`` of each stored element."""
    if tensor.col_indices is None:
        return np.arange(tensor.data.size, dtype=np.int64)
    return tensor.row_indices() * tensor.shape[1] + tensor.col_indices


def _nonzero_keys(tensor: TensorData) -> IntArray:
    keys: IntArray = _stored_keys(tensor)[tensor.data != 0]
    return keys


def _lookup(tensor: TensorData, keys: IntArray) -> npt.NDArray[np.generic]:
    """Elements at ``keys``; 0 where nothing is stored."""
    if not tensor.is_sparse:
        return tensor.data[keys]
    stored = _stored_keys(tensor)
    order = np.argsort(stored, kind="stable")
    found = np.zeros(keys.size, dtype=tensor.data.dtype)
    if stored.size:
        places = np.minimum(np.searchsorted(stored[order], keys), stored.size - 1)
        hits = stored[order][places] == keys
        found[hits] = tensor.data[order][places[hits]]
    return found


def _typed(name: str, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return values.astype(np.int64 if name == TARGETS else np.float32, copy=False)
