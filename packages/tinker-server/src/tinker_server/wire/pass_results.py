"""Results of forward and forward_backward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from tinker_core.types import ForwardBackwardOutput, JsonObject, TensorData
from tinker_server.wire.proto import tinker_server_wire_pb2 as pb
from tinker_server.wire.tensors import array_bytes, dense_bytes, tensor_to_json, to_proto_dtype

_RECORD = "ArrayRecord"

_Outputs = dict[str, TensorData]


def pass_to_proto(output: ForwardBackwardOutput) -> bytes:
    """One record per run of datums whose fields agree in everything but their first axis."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type=output.loss_fn_output_type or _RECORD)
    for _, run in itertools.groupby(output.loss_fn_outputs, key=_signature):
        _write_record(message.loss_fn_outputs.add(), list(run))
    for name, value in output.metrics.items():
        message.metrics[name] = value
    return message.SerializeToString()


def _signature(outputs: _Outputs) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    return tuple((name, outputs[name].dtype.value, outputs[name].shape[1:]) for name in sorted(outputs))


def _write_record(record: pb.ArrayRecord, datums: Sequence[_Outputs]) -> None:
    record.type_tag = _RECORD
    record.num_datums = len(datums)
    for name, first in datums[0].items():
        parts = [dense_bytes(datum[name]) for datum in datums]
        offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        field = record.fields[name]
        field.data = b"".join(parts)
        field.offsets = array_bytes(offsets, "<i8")
        field.dtype = to_proto_dtype(first.dtype)
        field.trailing_shape.extend(first.shape[1:])


def pass_to_json(output: ForwardBackwardOutput) -> JsonObject:
    """The form that clients before 0.25 read."""
    return {
        "loss_fn_output_type": output.loss_fn_output_type,
        "loss_fn_outputs": [
            {name: tensor_to_json(tensor) for name, tensor in datum.items()} for datum in output.loss_fn_outputs
        ],
        "metrics": dict(output.metrics),
    }
