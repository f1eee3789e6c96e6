"""A request's body: what it claims to be, and its bytes once they are unpacked."""

from __future__ import annotations

import json
import zlib

import attrs
import orjson
import zstandard

from tinker_core.errors import InvalidRequestError

PROTOBUF = "application/x-protobuf"
JSON = "application/json"

_SLICE = 1024
"""Compressed bytes fed at once, so that a bomb is noticed before it has unfolded far beyond the limit."""


class UndecodableBodyError(InvalidRequestError):
    """A body that is not what its headers claim; the request cannot even be assigned to a model."""


class BodyTooLargeError(InvalidRequestError):
    """A body beyond the server's limit, before or after decompression."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request body exceeds {limit} bytes; send fewer data per call, or raise --body-limit")
        self.limit = limit

    def __reduce__(self) -> tuple[type[BodyTooLargeError], tuple[int]]:
        return type(self), (self.limit,)


@attrs.frozen(kw_only=True)
class Body:
    """What arrived."""

    data: bytes
    content_type: str = JSON
    content_encoding: str = ""
    limit: int = 256 * 1024 * 1024
    """Most bytes after decompression."""

    @property
    def is_protobuf(self) -> bool:
        """Whether the body claims to be protobuf."""
        return PROTOBUF in self.content_type.lower()

    @property
    def is_large(self) -> bool:
        """Whether decoding takes long enough to be done off the event loop."""
        return len(self.data) > (64 * 1024 if self.content_encoding else 1024 * 1024)

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
        if not data.strip():
            return {}
        value = _parse_json(data)
        if not isinstance(value, dict):
            raise UndecodableBodyError(f"the request body must be a JSON object, got {type(value).__name__}")
        return value


def _parse_json(data: bytes) -> object:
    try:
        parsed: object = orjson.loads(data)
    except orjson.JSONDecodeError as strict_error:
        # Clients built on Python's json write NaN and Infinity, which no standard knows.
        if b"NaN" not in data and b"Infinity" not in data:
            raise UndecodableBodyError(f"the request body is not JSON: {strict_error}") from strict_error
        try:
            parsed = json.loads(data)
        except ValueError as error:
            raise UndecodableBodyError(f"the request body is not JSON: {error}") from error
    return parsed


def _unzstd(data: bytes, limit: int) -> bytes:
    try:
        size = zstandard.frame_content_size(data)
        if size > limit:
            raise BodyTooLargeError(limit)
        if size >= 0:
            return bytes(zstandard.ZstdDecompressor().decompress(data))
        return _unzstd_unsized(data, limit)
    except zstandard.ZstdError as error:
        raise UndecodableBodyError(f"the request body is not a whole zstd frame: {error}") from error


def _unzstd_unsized(data: bytes, limit: int) -> bytes:
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    parts: list[bytes] = []
    total = 0
    for start in range(0, len(data), _SLICE):
        part = unpacker.decompress(data[start : start + _SLICE])
        total += len(part)
        if total > limit:
            raise BodyTooLargeError(limit)
        parts.append(part)
        if unpacker.eof:
            return b"".join(parts)
    raise UndecodableBodyError("the request body is not a whole zstd frame: it ends early")


def _gunzip(data: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        plain = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise UndecodableBodyError(f"the request body is not gzip: {error}") from error
    if len(plain) > limit:
        raise BodyTooLargeError(limit)
    if not unpacker.eof:
        raise UndecodableBodyError("the request body is not a whole gzip stream: it ends early")
    return plain
