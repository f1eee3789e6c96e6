"""Bodies that unfold, claim or nest too much: refused by name, without unfolding."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.hostile import bombs
from tests.hostile.bombs import MIB
from tinker_core.custom_losses.check import check_custom_loss
from tinker_core.errors import InvalidCustomLossError, InvalidRequestError
from tinker_core.types import CreateCustomLossInput, TensorData, TensorDType
from tinker_server.wire.body import PROTOBUF, Body, BodyTooLargeError, TooManyPartsError, UndecodableBodyError
from tinker_server.wire.custom_losses import read_create_custom_loss
from tinker_server.wire.models import read_create_model
from tinker_server.wire.rejected import MAX_MESSAGE, RejectedRequest
from tinker_server.wire.sampling import read_asample
from tinker_server.wire.sessions import read_create_session, read_finish
from tinker_server.wire.training import read_forward_backward, read_optim_step


@contextmanager
def few_bytes(limit: int) -> Iterator[None]:
    """Fail when the block holds more than so many bytes at any time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak} bytes"


def rejection(decoded: object) -> str:
    assert isinstance(decoded, RejectedRequest), decoded
    return decoded.error.message


# --- content encodings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "encoding", "error"),
    [
        (bombs.zstd(bytes(64 * MIB)), "zstd", BodyTooLargeError),
        (bombs.zstd(bytes(64 * MIB), sized=False), "zstd", BodyTooLargeError),
        (bombs.zstd(bytes(64 * MIB), sized=False, window=27), "zstd", BodyTooLargeError),
        (bombs.many_frames(64), "zstd", UndecodableBodyError),
        (bombs.zstd(b"{}", sized=False) + bombs.zstd(b"{}"), "zstd", UndecodableBodyError),
        (bombs.lying_frame(), "zstd", UndecodableBodyError),
        (bombs.empty_frame_with_more(), "zstd", UndecodableBodyError),
        (bombs.huge_window(31), "zstd", UndecodableBodyError),
        (bombs.huge_window(41), "zstd", UndecodableBodyError),
        (bombs.zstd(bombs.zstd(bytes(64 * MIB))), "zstd", None),
        (bombs.gzip_bomb(64 * MIB), "gzip", BodyTooLargeError),
        (bombs.gzip_bomb(10) + bombs.gzip_bomb(64 * MIB), "gzip", UndecodableBodyError),
        (b"{}", "zstd, gzip", UndecodableBodyError),
    ],
)
def test_unpacking_stops_at_the_limit(data: bytes, encoding: str, error: type[Exception] | None) -> None:
    body = Body(data=data, content_encoding=encoding, limit=MIB)
    if error is None:  # packed twice: what comes out is packed still, and no JSON
        assert len(body.plain()) < MIB
        return
    with few_bytes(40 * MIB), pytest.raises(error):
        body.plain()


def test_a_large_window_that_is_not_needed_is_fine() -> None:
    assert Body(data=bombs.huge_window(27), content_encoding="zstd").json_object() == {}


# --- protobuf ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (bombs.empty_data(4 * MIB), TooManyPartsError),
        (bombs.empty_data(100_000), TooManyPartsError),
        (bombs.empty_chunks(4 * MIB), TooManyPartsError),
        (bombs.restless_chunk(4 * MIB), TooManyPartsError),
        (bombs.hidden_by_groups(4 * MIB), UndecodableBodyError),
        (bombs.empty_data(4 * MIB) + b"\x1a", TooManyPartsError),
    ],
)
def test_a_pass_of_too_many_parts_is_refused(data: bytes, error: type[Exception]) -> None:
    body = Body(data=data, content_type=PROTOBUF, max_parts=1000)
    with few_bytes(MIB):
        try:
            decoded = read_forward_backward(body)
        except error:
            return
    assert error is TooManyPartsError
    assert "--request-parts" in rejection(decoded)


def test_what_a_client_sends_at_most_is_well_within_the_limit() -> None:
    """A thousand data of a few chunks, tensors and spans each; the official client sends 1024 at most."""
    message = bombs.pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    for _ in range(1024):
        datum = message.data.add()
        for _ in range(8):
            datum.model_input.add().encoded_text.tokens = bytes(400)
            datum.model_input_spans.add().prompt_tokens.sequence_id = "q"
        for name in ("target_tokens", "weights", "advantages", "logprobs"):
            datum.loss_fn_inputs[name].dense = bytes(800)
            datum.loss_fn_inputs[name].dtype = bombs.pb.DTYPE_INT64
    body = Body(data=message.SerializeToString(), content_type=PROTOBUF)
    assert len(body.data) > 2 * MIB
    assert not isinstance(read_forward_backward(body), RejectedRequest)


def test_a_shape_of_a_million_axes_is_refused_unread() -> None:
    body = Body(data=bombs.long_shape(100_000), content_type=PROTOBUF)
    with few_bytes(4 * MIB):
        assert "more than 8" in rejection(read_forward_backward(body))


# --- shapes -----------------------------------------------------------------------------------------------------------

INT64 = np.iinfo(np.int64)


@pytest.mark.parametrize(
    "shape",
    [(10**12,), (2**32, 2**32), (2**63 - 1, 2), (-1, -1), (0, -5), (2**62, 4), (1,) * 9, (INT64.max,) * 8],
)
def test_a_shape_that_its_data_contradict(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape .*(needs|negative|axes)"):
        TensorData(dtype=TensorDType.INT64, shape=shape, data=np.zeros(1, np.int64))


@pytest.mark.parametrize(
    ("shape", "crow", "col"),
    [
        ((10**12, 3), [0, 1], [0]),
        ((1, 10**18), [0, 2], [0, -1]),
        ((2, 3), [0, 5, 1], [0]),
        ((2, 3), [0, INT64.min, 1], [0]),
        ((1, 3), [0, INT64.max], [0]),
        ((1, 3), [1, 1], [0]),
        ((1, 3), [0, 1], [3]),
        ((1, 3), [0, 1], [INT64.min]),
        ((-1, 3), [], []),
    ],
)
def test_a_sparse_tensor_that_lies(shape: tuple[int, int], crow: list[int], col: list[int]) -> None:
    with pytest.raises(ValueError, match=r"shape|crow_indices|col_indices"):
        TensorData(
            dtype=TensorDType.FLOAT32,
            shape=shape,
            data=np.zeros(1, np.float32),
            crow_indices=np.array(crow, np.int64),
            col_indices=np.array(col, np.int64),
        )


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": NaN, "b": ' + b"[" * 100_000,
        b'{"a": NaN, "b": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a": NaN, "b": "\\ud800"}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": Infinity}',
        b'{"a": NaN, "b": ' + b"9" * 5000 + b"}",
        b'{"a": NaN, "b": ' + b"9" * 30 + b"}",
        b'{"a": NaN',
        b"NaN",
        b'{"a": \xed\xa0\x80}',
    ],
)
def test_json_that_only_some_parsers_take(data: bytes) -> None:
    with pytest.raises(UndecodableBodyError):
        Body(data=data).json_object()


def test_the_last_of_two_equal_keys_counts() -> None:
    assert Body(data=b'{"a": 1, "a": 2}').json_object() == {"a": 2}
    assert Body(data=b'{"a": 1, "a": NaN, "a": 3}').json_object() == {"a": 3}


def test_json_of_too_many_lists_is_refused() -> None:
    body = Body(data=bombs.empty_lists(MIB), max_parts=1000)
    with few_bytes(MIB), pytest.raises(TooManyPartsError):
        body.json_object()


@pytest.mark.parametrize("name", ["data", "shape"])
def test_a_list_with_a_text_makes_no_wide_array(name: str) -> None:
    body = bombs.mixed_list(100_000, 100_000).replace(b'"data": [0', f'"{name}": [0'.encode())
    with few_bytes(20 * MIB):
        rejection(read_forward_backward(Body(data=body)))


@pytest.mark.parametrize("text", ["9" * 5000, "18446744073709551616", "1e999", "-1e999", "1" + "0" * 400])
@pytest.mark.parametrize("field", ['"seq_id"', '"adam_params": {"learning_rate"'])
def test_numbers_beyond_all_bounds(text: str, field: str) -> None:
    closing = "}}" if "{" in field else "}"
    data = f'{{"model_id": "m", "seq_id": 1, {field}: {text}{closing}'.encode()
    try:
        decoded = read_optim_step(Body(data=data))
    except InvalidRequestError:
        return
    if isinstance(decoded, RejectedRequest):
        assert len(decoded.error.message) < MAX_MESSAGE


@pytest.mark.parametrize("text", ["9223372036854775808", "-9223372036854775809", "18446744073709551615"])
def test_integers_beyond_64_bits(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        read_optim_step(Body(data=f'{{"model_id": "m", "seq_id": {text}}}'.encode()))


def test_a_deep_value_is_named_shortly() -> None:
    """Python shows nested values by recursion, and would give up in the middle of an error message."""
    data = b'{"model_id": "m", "seq_id": 1, "adam_params": ' + b"[" * 1000 + b"]" * 1000 + b"}"
    assert "must be an object" in rejection(read_optim_step(Body(data=data)))


ARGUMENTS = ['{"nothing": DEEP}', '{"tuple": DEEP}', "DEEP", '{"ref": DEEP}', '{"slice": [DEEP, 1, 2]}']


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_deep_argument_of_a_custom_loss(argument: str) -> None:
    deep = argument.replace("DEEP", "[" * 900 + "]" * 900)
    nodes = (
        '{"op": "placeholder", "name": "logprobs", "target": "logprobs"},'
        f'{{"op": "call_method", "name": "a", "target": "sum", "args": [{deep}]}}'
    )
    inputs = '[{"name": "logprobs", "rank": 1}]'
    place = '"session_id": "s", "custom_loss_seq_id": 0, "name": "n"'
    data = f'{{{place}, "inputs": {inputs}, "graph": {{"nodes": [{nodes}]}}}}'
    read = read_create_custom_loss(Body(data=data.encode()))
    assert isinstance(read, CreateCustomLossInput)
    with pytest.raises(InvalidCustomLossError, match="node 'a'"):
        check_custom_loss(read.loss)


# --- counts that cost nothing to write --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2**62, 10**9, 20_000])
def test_a_billion_samples(number: int) -> None:
    data = f'{{"sampling_session_id": "s", "seq_id": 1, "num_samples": {number}, "prompt": {{"chunks": []}}}}'.encode()
    assert "num_samples must be" in rejection(read_asample(Body(data=data)))


def test_many_stops() -> None:
    params = f'{{"stop": [{",".join("1" * 5000)}]}}'
    data = f'{{"sampling_session_id": "s", "seq_id": 1, "prompt": {{"chunks": []}}, "sampling_params": {params}}}'
    assert "at most 1024" in rejection(read_asample(Body(data=data.encode())))


def test_large_metadata() -> None:
    large, deep = '"' + "x" * MIB + '"', "[" * 300 + "]" * 300
    for value in (large, deep):
        metadata = f'"user_metadata": {{"k": {value}}}'
        data = f'{{"session_id": "s", "model_seq_id": 0, "base_model": "b", {metadata}}}'.encode()
        assert "bytes of JSON" in rejection(read_create_model(Body(data=data)))
        with pytest.raises(InvalidRequestError, match="bytes of JSON"):
            read_create_session(Body(data=data))


def test_long_and_strange_texts() -> None:
    for value in ("x" * 100_000, "a\\u0000b"):
        with pytest.raises(InvalidRequestError) as caught:
            read_optim_step(Body(data=f'{{"model_id": "{value}", "seq_id": 1}}'.encode()))
        assert len(str(caught.value)) < 400


def test_a_long_traceback_does_not_fail_the_end_of_a_session() -> None:
    finish = read_finish(Body(data=f'{{"reason": {{"type": "errored"}}, "detail": "{"x" * 500_000}"}}'.encode()))
    assert finish.detail is not None
    assert len(finish.detail) < 2 * MAX_MESSAGE
