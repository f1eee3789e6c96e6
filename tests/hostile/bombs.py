"""Small requests that ask for a lot."""

from __future__ import annotations

import gzip
import json

import zstandard

from tinker_server.wire.proto import tinker_server_wire_pb2 as pb

MIB = 1024 * 1024


def zstd(data: bytes, *, sized: bool = True, window: int = 0) -> bytes:
    if window:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            3, window_log=window, enable_ldm=False, write_content_size=sized
        )
        return zstandard.ZstdCompressor(compression_params=parameters).compress(data)
    return zstandard.ZstdCompressor(level=3, write_content_size=sized).compress(data)


def many_frames(number: int) -> bytes:
    """Frames back to back; the first says that it is small."""
    return zstd(b"{}") + zstd(bytes(MIB)) * number


def lying_frame() -> bytes:
    """A frame whose header says 7 bytes, and that holds a megabyte."""
    small, large = zstd(bytes(7)), zstd(bytes(MIB), sized=False)
    return small[:6] + large[6:]


def empty_frame_with_more() -> bytes:
    """A frame that says it is empty, with something behind its header."""
    return zstd(b"")[:6] + zstd(b'{"a": 1}')[6:]


def huge_window(log: int) -> bytes:
    """The header of a frame that wants a window of ``2**log`` bytes, and one raw block."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(log - 10) << 3]) + (2 << 3 | 1).to_bytes(3, "little") + b"{}"


def gzip_bomb(size: int) -> bytes:
    return gzip.compress(bytes(size), compresslevel=9, mtime=0)


def empty_data(number: int) -> bytes:
    """A pass of empty data: two bytes each."""
    return _head() + b"\x1a\x00" * number


def empty_chunks(number: int) -> bytes:
    """A datum of empty chunks."""
    return _head() + pb.ForwardBackwardRequest(data=[pb.Datum()]).SerializeToString()[:1] + _sized(b"\x0a\x00" * number)


def restless_chunk(number: int) -> bytes:
    """A chunk that changes its mind about its kind: each change is a new object."""
    chunk = b"\x0a\x00\x12\x00" * number
    return _head() + b"\x1a" + _sized(b"\x0a" + _sized(chunk))


def long_shape(number: int) -> bytes:
    """A tensor of a million axes, each as long as can be: their product alone takes hours."""
    tensor = b"\x22" + _sized(b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f" * number) + b"\x18\x02"
    entry = b"\x0a\x01t\x12" + _sized(tensor)
    return _head() + b"\x1a" + _sized(b"\x12" + _sized(entry))


def hidden_by_groups(number: int) -> bytes:
    """Empty data behind a group, which parsers skip and counters may stumble over."""
    return _head() + b"\xa3\x06\xa4\x06" + b"\x1a\x00" * number


def _head() -> bytes:
    return pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy").SerializeToString()


def _sized(data: bytes) -> bytes:
    size, prefix = len(data), bytearray()
    while size > 127:
        prefix.append(size & 127 | 128)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + data


def empty_lists(number: int) -> bytes:
    """JSON of empty lists."""
    return b'{"model_id": "m", "seq_id": 1, "x": [' + b"[]," * number + b"[]]}"


def mixed_list(number: int, length: int) -> bytes:
    """Numbers and one long text: an array that holds both would be as wide as the text everywhere."""
    data = json.dumps([0] * number + ["x" * length])
    tensor = f'{{"data": {data}, "dtype": "float32"}}'
    datum = f'{{"model_input": {{"chunks": []}}, "loss_fn_inputs": {{"weights": {tensor}}}}}'
    wrapped = f'{{"loss_fn": "cross_entropy", "data": [{datum}]}}'
    return f'{{"model_id": "m", "seq_id": 1, "forward_backward_input": {wrapped}}}'.encode()
