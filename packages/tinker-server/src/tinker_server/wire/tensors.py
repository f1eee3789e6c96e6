"""Tensors: protobuf and JSON forms. A tensor that contradicts itself raises `ValueError` with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tinker_core.types import MAX_AXES, TensorData, TensorDType
from tinker_server.wire.fields import Fields
from tinker_server.wire.proto import tinker_server_wire_pb2 as pb

_WIRE: dict[TensorDType, np.dtype[Any]] = {
    TensorDType.FLOAT32: np.dtype("<f4"),
    TensorDType.INT64: np.dtype("<i8"),
}
_FROM_PROTO: dict[int, TensorDType] = {pb.DTYPE_FLOAT32: TensorDType.FLOAT32, pb.DTYPE_INT64: TensorDType.INT64}
_TO_PROTO: dict[TensorDType, pb.DType] = {
    TensorDType.FLOAT32: pb.DTYPE_FLOAT32,
    TensorDType.INT64: pb.DTYPE_INT64,
}


def to_proto_dtype(dtype: TensorDType) -> pb.DType:
    """The wire's number for an element type."""
    return _TO_PROTO[dtype]


def array_bytes(array: npt.NDArray[np.generic], dtype: str) -> bytes:
    """Little-endian C-order bytes of an array as ``dtype``, for example ``"<i4"``."""
    return np.ascontiguousarray(array, dtype=np.dtype(dtype)).tobytes()


def read_array(data: bytes, dtype: str, what: str) -> npt.NDArray[Any]:
    """A flat read-only array over little-endian bytes."""
    item = np.dtype(dtype)
    if len(data) % item.itemsize:
        raise ValueError(f"{what} has {len(data)} bytes, not a multiple of {item.itemsize}")
    return np.frombuffer(data, dtype=item)


def tensor_from_proto(message: pb.Tensor) -> TensorData:
    """A request's tensor; without a shape it has one axis."""
    if len(message.shape) > MAX_AXES:
        raise ValueError(f"the shape has {len(message.shape)} axes, more than {MAX_AXES}")
    dtype = _FROM_PROTO.get(message.dtype)
    if dtype is None:
        raise ValueError(f"dtype number {message.dtype} is neither float32 (1) nor int64 (2)")
    if message.HasField("sparse_csr"):
        sparse = message.sparse_csr
        return TensorData(
            dtype=dtype,
            shape=tuple(message.shape),
            data=read_array(sparse.values, _WIRE[dtype].str, "values"),
            crow_indices=read_array(sparse.crow_indices, "<i8", "crow_indices"),
            col_indices=read_array(sparse.col_indices, "<i8", "col_indices"),
        )
    data = read_array(message.dense, _WIRE[dtype].str, "the data")
    return TensorData(dtype=dtype, shape=tuple(message.shape) or (data.size,), data=data)


def tensor_to_proto(tensor: TensorData, message: pb.Tensor) -> None:
    """Write a result's tensor, dense or CSR as it is."""
    message.dtype = _TO_PROTO[tensor.dtype]
    message.shape.extend(tensor.shape)
    values = array_bytes(tensor.data, _WIRE[tensor.dtype].str)
    if tensor.crow_indices is None or tensor.col_indices is None:
        message.dense = values
        return
    message.sparse_csr.values = values
    message.sparse_csr.crow_indices = array_bytes(tensor.crow_indices, "<i8")
    message.sparse_csr.col_indices = array_bytes(tensor.col_indices, "<i8")


def dense_bytes(tensor: TensorData) -> bytes:
    """The dense elements of a tensor in its own element type."""
    return array_bytes(tensor.to_numpy(), _WIRE[tensor.dtype].str)


def tensor_from_json(fields: Fields) -> TensorData:
    """A tensor in the SDK's JSON form; without a shape it has one axis."""
    name = fields.text("dtype")
    try:
        dtype = TensorDType(name)
    except ValueError:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(TensorDType)}") from None
    data = number_array(fields.objects("data"), dtype, "data")
    shape = fields.objects("shape", None)
    if shape is not None and len(shape) > MAX_AXES:
        raise ValueError(f"the shape has {len(shape)} axes, more than {MAX_AXES}")
    sizes = number_array(shape, TensorDType.INT64, "shape").tolist() if shape is not None else [data.size]
    crow = fields.objects("sparse_crow_indices", None)
    col = fields.objects("sparse_col_indices", None)
    fields.log_unknown()
    return TensorData(
        dtype=dtype,
        shape=tuple(sizes),
        data=data,
        crow_indices=None if crow is None else number_array(crow, TensorDType.INT64, "sparse_crow_indices"),
        col_indices=None if col is None else number_array(col, TensorDType.INT64, "sparse_col_indices"),
    )


def number_array(values: list[object], dtype: TensorDType, what: str) -> npt.NDArray[Any]:
    """A flat array of a JSON list of numbers; fractions are refused where integers are wanted."""
    if not values:
        return np.zeros(0, dtype=_WIRE[dtype])
    # numpy would make room for the longest text of a list in each of its elements, so it only ever sees numbers.
    allowed = {int} if dtype is TensorDType.INT64 else {int, float}
    noun = "64-bit integers" if dtype is TensorDType.INT64 else "numbers"
    if not allowed.issuperset(map(type, values)):
        raise ValueError(f"{what} must be a flat list of {noun}")
    try:
        with np.errstate(over="ignore"):
            return np.array(values, dtype=_WIRE[dtype])
    except OverflowError as error:
        raise ValueError(f"{what} must be a flat list of {noun}: {error}") from error


def tensor_to_json(tensor: TensorData) -> dict[str, object]:
    """A dense tensor in the SDK's JSON form; a sparse one is filled up."""
    dense = tensor.to_numpy()
    return {"data": dense.reshape(-1).tolist(), "dtype": tensor.dtype.value, "shape": list(dense.shape)}
