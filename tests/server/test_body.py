"""Content encodings and their limits."""

from __future__ import annotations

import gzip

import pytest
import zstandard

from tinker_server.wire.body import Body, BodyTooLargeError, UndecodableBodyError

DATA = b'{"a": 1}' * 1000
LIMIT = 100_000


def zstd(data: bytes, *, sized: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=sized).compress(data)


def plain(data: bytes, encoding: str) -> bytes:
    return Body(data=data, content_encoding=encoding, limit=LIMIT).plain()


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (DATA, ""),
        (DATA, "identity"),
        (zstd(DATA), "zstd"),
        (zstd(DATA, sized=False), "zstd"),
        (gzip.compress(DATA, mtime=0), "GZIP"),
    ],
)
def test_encodings(data: bytes, encoding: str) -> None:
    assert plain(data, encoding) == DATA


@pytest.mark.parametrize("sized", [True, False])
def test_a_zstd_bomb_is_noticed(sized: bool) -> None:
    with pytest.raises(BodyTooLargeError, match="--body-limit"):
        plain(zstd(bytes(50_000_000), sized=sized), "zstd")


def test_a_gzip_bomb_is_noticed() -> None:
    with pytest.raises(BodyTooLargeError):
        plain(gzip.compress(bytes(50_000_000)), "gzip")


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (zstd(DATA)[:-3], "zstd"),
        (zstd(DATA, sized=False)[:-3], "zstd"),
        (gzip.compress(DATA, mtime=0)[:-9], "gzip"),
        (DATA, "zstd"),
        (DATA, "gzip"),
        (DATA, "br"),
    ],
)
def test_broken_encodings_are_refused(data: bytes, encoding: str) -> None:
    with pytest.raises(UndecodableBodyError):
        plain(data, encoding)


@pytest.mark.parametrize("data", [b"{", b"[1]", b"3", b"{NaN}", b"\xff"])
def test_a_body_must_be_a_json_object(data: bytes) -> None:
    with pytest.raises(UndecodableBodyError):
        Body(data=data).json_object()


def test_an_empty_body_is_an_empty_object() -> None:
    assert Body(data=b"").json_object() == {}
