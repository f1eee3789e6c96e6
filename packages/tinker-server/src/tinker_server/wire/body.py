"""A request's body: what it claims to be, and its bytes once they are unpacked."""

from __future__ import annotations

import io
import json
import zlib

import attrs
import orjson
import zstandard

from tinker_core.errors import InvalidRequestError

PROTOBUF = "application/x-protobuf"
JSON = "application/json"

_SLICE = 128
"""Compressed bytes fed at once, so that a bomb is noticed before it has unfolded far beyond the limit."""
_INLINE = 16 * 1024
"""Bytes that are decoded on the event loop; even the worst of that size is done within a tenth of a second."""
_MAX_WINDOW = 128 * 1024 * 1024
"""Largest zstd window: what the format's own tools allow by default."""
_BRACKETS_PER_PART = 4
"""JSON objects and lists that one datum, chunk or tensor is made of, at most."""


class UndecodableBodyError(InvalidRequestError):
    """A body that is not what its headers claim; the request cannot even be assigned to a model."""


class BodyTooLargeError(InvalidRequestError):
    """A body beyond the server's limit, before or after decompression."""

    def __init__(self, limit: int, flag: str = "--body-limit") -> None:
        super().__init__(f"the request body exceeds {limit} bytes; send fewer data per call, or raise {flag}")
        self.limit = limit
        self.flag = flag

    def __reduce__(self) -> tuple[type[BodyTooLargeError], tuple[int, str]]:
        return type(self), (self.limit, self.flag)


class TooManyPartsError(InvalidRequestError):
    """A body of more data, chunks, tensors and spans than the server decodes at once."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the request has more than {limit} parts (data, chunks, tensors, spans); send fewer data per call, or "
            "raise --request-parts"
        )
        self.limit = limit

    def __reduce__(self) -> tuple[type[TooManyPartsError], tuple[int]]:
        return type(self), (self.limit,)


@attrs.frozen(kw_only=True)
class Body:
    """What arrived."""

    data: bytes
    content_type: str = JSON
    content_encoding: str = ""
    limit: int = 256 * 1024 * 1024
    """Most bytes after decompression."""
    max_parts: int = 64 * 1024
    """Most data, chunks, tensors and spans together: each takes many times its bytes once it is decoded."""

    @property
    def is_protobuf(self) -> bool:
        """Whether the body claims to be protobuf."""
        return PROTOBUF in self.content_type.lower()

    @property
    def is_large(self) -> bool:
        """Whether decoding takes long enough to be done off the event loop."""
        return bool(self.content_encoding) or len(self.data) > _INLINE

    def plain(self) -> bytes:
        """The bytes without their content encoding."""
        encoding = self.content_encoding.strip().lower()
        if encoding in ("", "identity"):
            return self.data
        if encoding == "zstd":
            return _unzstd(self.data, self.limit)
        if encoding == "gzip":
            return _gunzip(self.data, self.limit)
        raise UndecodableBodyError(f"content-encoding {encoding!r} is not supported; use zstd, gzip or none")

    def json_object(self) -> dict[str, object]:
        """The body as a JSON object; an empty body is an empty object. NaN and Infinity are understood."""
        data = self.plain()
        if not data or data.isspace():
            return {}
        self._check_brackets(data)
        value = _parse_json(data)
        if not isinstance(value, dict):
            raise UndecodableBodyError(f"the request body must be a JSON object, got {type(value).__name__}")
        return value

    def _check_brackets(self, data: bytes) -> None:
        """Empty objects and lists take twenty times their bytes; brackets inside of texts are counted as well."""
        allowed = self.max_parts * _BRACKETS_PER_PART
        if len(data) > allowed and data.count(b"{") + data.count(b"[") > allowed:
            raise TooManyPartsError(self.max_parts)


def _parse_json(data: bytes) -> object:
    try:
        parsed: object = orjson.loads(data)
    except orjson.JSONDecodeError as strict_error:
        # Clients built on Python's json write NaN and Infinity, which no standard knows.
        if b"NaN" not in data and b"Infinity" not in data:
            raise UndecodableBodyError(f"the request body is not JSON: {strict_error}") from strict_error
        return _parse_python_json(data)
    return parsed


def _parse_python_json(data: bytes) -> object:
    try:
        parsed: object = json.loads(data)
        orjson.dumps(parsed)  # refuses what the strict parser refuses too: lone surrogates, huge integers, deep nesting
    except (ValueError, TypeError, RecursionError) as error:
        raise UndecodableBodyError(f"the request body is not JSON: {error}") from error
    return parsed


def _unzstd(data: bytes, limit: int) -> bytes:
    try:
        size = zstandard.frame_content_size(data)
        if size > limit:
            raise BodyTooLargeError(limit)
        if size <= 0:  # unknown; or claimed to be nothing, which the other way would believe without a look
            return _unzstd_unsized(data, limit)
        unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        return bytes(unpacker.decompress(data, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise UndecodableBodyError(f"the request body is not one whole zstd frame: {error}") from error


def _unzstd_unsized(data: bytes, limit: int) -> bytes:
    unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
    plain = io.BytesIO()
    for start in range(0, len(data), _SLICE):
        plain.write(unpacker.decompress(data[start : start + _SLICE]))
        if plain.tell() > limit:
            raise BodyTooLargeError(limit)
        if unpacker.eof:
            _refuse_rest(len(unpacker.unused_data) + max(0, len(data) - start - _SLICE), "zstd frame")
            return plain.getvalue()
    raise UndecodableBodyError("the request body is not one whole zstd frame: it ends early")


def _gunzip(data: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        plain = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise UndecodableBodyError(f"the request body is not gzip: {error}") from error
    if len(plain) > limit:
        raise BodyTooLargeError(limit)
    if not unpacker.eof:
        raise UndecodableBodyError("the request body is not one whole gzip stream: it ends early")
    _refuse_rest(len(unpacker.unused_data), "gzip stream")
    return plain


def _refuse_rest(size: int, noun: str) -> None:
    if size > 0:
        raise UndecodableBodyError(f"the request body is not one whole {noun}: {size} bytes follow it")
