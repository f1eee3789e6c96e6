"""Requests and results as the journal keeps them: typed records to bytes and back."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import attrs

from tinker_core.encoding import Encoder
from tinker_core.errors import DamagedRecordError
from tinker_core.storage.journal import Journal
from tinker_core.types import (
    AcceptedRequest,
    Caller,
    CreateCustomLossInput,
    CreateCustomLossOutput,
    CreateModelInput,
    CreateModelOutput,
    EngineOutput,
    EngineRequest,
    ForwardBackwardInput,
    ForwardBackwardOutput,
    LoadWeightsInput,
    LoadWeightsOutput,
    OptimStepInput,
    OptimStepOutput,
    RequestError,
    RequestType,
    SampleInput,
    SampleOutput,
    SampleTarget,
    SaveWeightsExternalInput,
    SaveWeightsForSamplerInput,
    SaveWeightsInput,
    SaveWeightsOutput,
    UnloadModelInput,
    UnloadModelOutput,
)

_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        CreateModelInput,
        ForwardBackwardInput,
        OptimStepInput,
        SaveWeightsInput,
        SaveWeightsForSamplerInput,
        SaveWeightsExternalInput,
        LoadWeightsInput,
        UnloadModelInput,
        SampleInput,
        CreateCustomLossInput,
        CreateModelOutput,
        CreateCustomLossOutput,
        ForwardBackwardOutput,
        OptimStepOutput,
        SaveWeightsOutput,
        LoadWeightsOutput,
        UnloadModelOutput,
        SampleOutput,
        RequestError,
    )
}
"""By the names that records carry in the journal."""
_LARGE_DATA = 64
"""Data of a pass that are encoded off the event loop: thousands of them would stop it for a second."""

_encoder = Encoder()


@attrs.frozen(kw_only=True)
class RequestHead:
    """What the engine must know of an accepted request without reading its body."""

    number: int
    request_id: str
    request_type: RequestType
    caller: Caller
    scope: str
    """What ``place`` counts in; the two are the request's identity."""
    place: int
    accepted_at: float
    """Unix seconds."""
    model_id: str | None = None
    seq_id: int | None = None
    """Its place in the order of its model; None for requests without one."""
    num_samples: int = 0
    target: SampleTarget | None = None
    num_tokens: int = 0
    max_tokens: int = 0
    publishes: bool = False
    """Whether it publishes weights of a live model (an ephemeral save)."""
    moves_inflight: bool = False
    """Whether it also moves the model's inflight target there."""

    def receipt(self) -> AcceptedRequest:
        """What the client was told."""
        return AcceptedRequest(
            request_id=self.request_id,
            request_type=self.request_type,
            model_id=self.model_id,
            sample_sequence_ids=tuple(f"{self.request_id}:{i}" for i in range(self.num_samples)) or None,
        )


def encode_head(head: RequestHead) -> bytes:
    """Bytes of a head."""
    return _encoder.encode(head, RequestHead)


def decode_head(data: bytes) -> RequestHead:
    """The head that `encode_head` got."""
    head: RequestHead = _encoder.decode(data, RequestHead)
    return head


def encode_record(record: EngineRequest | EngineOutput) -> bytes:
    """Bytes of a request's body or result, with the name of its class in front."""
    name = type(record).__name__
    return name.encode() + b"\0" + _encoder.encode(record, _CLASSES[name])


async def encode_request(request: EngineRequest) -> bytes:
    """`encode_record`, off the event loop for large ones."""
    if isinstance(request, ForwardBackwardInput) and len(request.data) > _LARGE_DATA:
        return await asyncio.to_thread(partial(encode_record, request))
    return encode_record(request)


def decode_request(data: bytes) -> EngineRequest:
    """The request that `encode_record` got. Raises `DamagedRecordError` for a class that this version does not know."""
    request: EngineRequest = _decode(data)
    return request


async def read_request(journal: Journal, number: int) -> EngineRequest:
    """The request whose body the journal has under a number. Raises `DamagedRecordError`."""
    body = await journal.body(number)
    if body is None:
        raise DamagedRecordError(f"the journal has lost the body of record {number}")
    return decode_request(body)


def decode_output(data: bytes) -> EngineOutput:
    """The result that `encode_record` got. Raises `DamagedRecordError` for a class that this version does not know."""
    output: EngineOutput = _decode(data)
    return output


def _decode(data: bytes) -> Any:  # noqa: ANN401 - of the class that its name says
    name, _, payload = data.partition(b"\0")
    cls = _CLASSES.get(name.decode("ascii", "replace"))
    if cls is None:
        raise DamagedRecordError(f"the journal holds a record of the unknown type {name[:40]!r}; a newer version's?")
    return _encoder.decode(payload, cls)
