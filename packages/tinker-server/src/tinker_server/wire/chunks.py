"""Chunks of model input: protobuf and JSON forms, with or without the JSON ``type``."""

from __future__ import annotations

import base64

import numpy as np

from tinker_core.errors import InvalidRequestError, UnsupportedFeatureError
from tinker_core.types import (
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    ModelInput,
    ModelInputChunk,
    TensorDType,
)
from tinker_server.wire.fields import Fields, as_object
from tinker_server.wire.proto import tinker_server_wire_pb2 as pb
from tinker_server.wire.tensors import number_array, read_array

_INT32 = np.iinfo(np.int32)


def chunk_from_proto(message: pb.Chunk) -> ModelInputChunk:
    """A chunk; raises `ValueError` for broken bytes, `UnsupportedFeatureError` for features nobody implements."""
    kind = message.WhichOneof("chunk")
    if kind == "encoded_text":
        return EncodedTextChunk(tokens=read_array(message.encoded_text.tokens, "<i4", "tokens"))
    if kind == "image":
        image = message.image
        if image.HasField("override_dimensions"):
            raise UnsupportedFeatureError("override_dimensions of images is not supported; resize the image instead")
        expected = image.expected_tokens if image.HasField("expected_tokens") else None
        return ImageChunk(data=image.data, format=image.format, expected_tokens=expected)
    if kind == "dmel":
        return DmelChunk(dmel=message.dmel.dmel)
    raise ValueError("the chunk is of no known kind; known are encoded_text, image, dmel")


def model_input_from_json(fields: Fields) -> ModelInput:
    """A ``{"chunks": [...]}`` object."""
    chunks = [
        _chunk_from_json(as_object(item, f"chunks[{index}]")) for index, item in enumerate(fields.objects("chunks"))
    ]
    fields.log_unknown()
    return ModelInput(chunks=tuple(chunks))


def _chunk_from_json(fields: Fields) -> ModelInputChunk:
    kind = fields.text("type", None) or _guess_kind(fields)
    chunk: ModelInputChunk
    if kind == "encoded_text":
        chunk = EncodedTextChunk(tokens=_token_array(fields.objects("tokens")))
    elif kind == "image":
        expected = fields.integer("expected_tokens", None)
        chunk = ImageChunk(data=_base64(fields, "data"), format=fields.text("format"), expected_tokens=expected)
    elif kind == "image_asset_pointer":
        expected = fields.integer("expected_tokens", None)
        chunk = ImageAssetPointerChunk(
            format=fields.text("format"), location=fields.text("location"), expected_tokens=expected
        )
    elif kind == "dmel":
        chunk = DmelChunk(dmel=_base64(fields, "dmel"))
    else:
        raise InvalidRequestError(
            f"chunk type {kind!r} is unknown; known are encoded_text, image, image_asset_pointer, dmel"
        )
    fields.log_unknown()
    return chunk


def _guess_kind(fields: Fields) -> str:
    """Clients before 0.18 leave the type out; their image chunks may carry a number named ``tokens``."""
    if fields.has("data"):
        return "image"
    if fields.has("location"):
        return "image_asset_pointer"
    if fields.has("dmel"):
        return "dmel"
    return "encoded_text"


def _token_array(values: list[object]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    try:
        tokens = number_array(values, TensorDType.INT64, "tokens")
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error
    if tokens.size and (tokens.min() < _INT32.min or tokens.max() > _INT32.max):
        raise InvalidRequestError(f"tokens must fit 32 bits, got {int(tokens.min())}..{int(tokens.max())}")
    return tokens.astype(np.int32)


def _base64(fields: Fields, key: str) -> bytes:
    value = fields.raw(key)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{key} is required; send a text in base64")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:  # also for letters outside ASCII
        raise InvalidRequestError(f"{key} is not base64: {error}") from error
