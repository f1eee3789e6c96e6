"""Tensors as they travel: numpy inside, dense or compressed sparse rows."""

from __future__ import annotations

import math
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinker_core.types.enums import TensorDType

_NUMPY_DTYPES: dict[TensorDType, np.dtype[np.generic]] = {
    TensorDType.FLOAT32: np.dtype(np.float32),
    TensorDType.INT64: np.dtype(np.int64),
}

MAX_AXES = 8
"""Most axes of a tensor; no loss takes more than two."""


@attrs.frozen(kw_only=True, eq=False)
class TensorData:
    """One tensor, dense or CSR (SDK ``types.TensorData``).

    Raises `ValueError` when made with parts that contradict each other, so a record in hand is always well-formed.
    """

    dtype: TensorDType
    """Element type of ``data``."""
    shape: tuple[int, ...]
    """Dense shape, also for CSR."""
    data: npt.NDArray[Any]
    """Flat C-order elements when dense, the stored values ``[nnz]`` when CSR."""
    crow_indices: npt.NDArray[np.int64] | None = None
    """CSR row starts, int64 ``[rows + 1]``; None when dense."""
    col_indices: npt.NDArray[np.int64] | None = None
    """CSR column of each stored value, int64 ``[nnz]``; None when dense."""

    def __attrs_post_init__(self) -> None:
        if len(self.shape) > MAX_AXES:
            raise ValueError(f"the shape has {len(self.shape)} axes, more than {MAX_AXES}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape {list(self.shape)} has a negative size")
        if self.data.dtype != _NUMPY_DTYPES[self.dtype] or self.data.ndim != 1:
            raise ValueError(
                f"data must be a flat {self.dtype} array, got {self.data.dtype} with {self.data.ndim} axes"
            )
        if (self.crow_indices is None) != (self.col_indices is None):
            raise ValueError("a sparse tensor needs both crow_indices and col_indices")
        if self.crow_indices is None or self.col_indices is None:
            expected = math.prod(self.shape)
            if self.data.size != expected:
                raise ValueError(f"shape {list(self.shape)} needs {expected} elements, got {self.data.size}")
        else:
            self._check_sparse(self.crow_indices, self.col_indices)

    def _check_sparse(self, crow: npt.NDArray[np.int64], col: npt.NDArray[np.int64]) -> None:
        if len(self.shape) != 2:
            raise ValueError(f"a sparse tensor must be 2-D, got shape {list(self.shape)}")
        if crow.dtype != np.int64 or col.dtype != np.int64 or crow.ndim != 1 or col.ndim != 1:
            raise ValueError("sparse indices must be flat int64 arrays")
        rows, columns = self.shape
        if crow.size != rows + 1 or crow[0] != 0 or crow[-1] != col.size or np.any(np.diff(crow) < 0):
            raise ValueError(f"crow_indices must rise from 0 to {col.size} in {rows + 1} entries")
        if col.size != self.data.size:
            raise ValueError(f"{col.size} col_indices for {self.data.size} values")
        if col.size and (col.min() < 0 or col.max() >= columns):
            raise ValueError(f"col_indices must lie in 0..{columns - 1}")

    @property
    def is_sparse(self) -> bool:
        """Whether the tensor is stored as CSR."""
        return self.crow_indices is not None

    @classmethod
    def from_numpy(cls, array: npt.NDArray[np.generic]) -> TensorData:
        """Dense tensor from a float or integer array of any shape; floats become float32, integers int64."""
        dtype = TensorDType.FLOAT32 if np.issubdtype(array.dtype, np.floating) else TensorDType.INT64
        flat = np.ascontiguousarray(array, dtype=_NUMPY_DTYPES[dtype]).reshape(-1)
        return cls(dtype=dtype, shape=tuple(array.shape), data=flat)

    def row_indices(self) -> npt.NDArray[np.int64]:
        """Row of each stored value, int64 ``[nnz]``; only for CSR."""
        if self.crow_indices is None:
            raise ValueError("a dense tensor has no row indices")
        return np.repeat(np.arange(self.shape[0], dtype=np.int64), np.diff(self.crow_indices))

    def to_numpy(self) -> npt.NDArray[Any]:
        """Dense array of ``shape``; cells that CSR does not store are 0."""
        if self.col_indices is None:
            return self.data.reshape(self.shape)
        dense = np.zeros(self.shape, dtype=self.data.dtype)
        np.add.at(dense, (self.row_indices(), self.col_indices), self.data)
        return dense

    def with_data(self, data: npt.NDArray[np.generic]) -> TensorData:
        """The same layout (shape and sparse indices) around other elements, one per stored element."""
        dtype = TensorDType.FLOAT32 if np.issubdtype(data.dtype, np.floating) else TensorDType.INT64
        return TensorData(
            dtype=dtype,
            shape=self.shape,
            data=np.ascontiguousarray(data, dtype=_NUMPY_DTYPES[dtype]).reshape(-1),
            crow_indices=self.crow_indices,
            col_indices=self.col_indices,
        )
