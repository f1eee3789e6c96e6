"""What is fuzzed: functions of some bytes that return, or raise what must never be raised.

Only `TinkerError` may come out of a reader, and what it returns must survive the border to the worker processes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, get_args

import attrs
import orjson

import tinker_server.wire
from tinker_core.custom_losses.check import check_custom_loss
from tinker_core.encoding import Encoder
from tinker_core.errors import TinkerError
from tinker_core.types import CreateCustomLossInput, EngineRequest
from tinker_server.wire.body import PROTOBUF, Body
from tinker_server.wire.rejected import RejectedRequest
from tinker_server.wire.training import read_forward_backward

Target = Callable[[bytes], None]

LIMIT = 1024 * 1024
"""Bytes of an unpacked body while fuzzing."""
PARTS = 2000

_EXTRA_ARGUMENTS: dict[str, dict[str, Any]] = {
    "read_text": {"key": "session_id"},
    "read_copy_weights": {"token": None, "idempotency_key": "k"},
}
_ENCODER = Encoder()


def readers() -> dict[str, Callable[[Body], object]]:
    """Every ``read_*`` function of `tinker_server.wire` that takes a body, by module and name."""
    found: dict[str, Callable[[Body], object]] = {}
    for info in pkgutil.iter_modules(tinker_server.wire.__path__):
        module = importlib.import_module(f"tinker_server.wire.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("read_") and function.__module__ == module.__name__ and _takes_body(function):
                found[f"{info.name}.{name}"] = functools.partial(function, **_EXTRA_ARGUMENTS.get(name, {}))
    return found


def _takes_body(function: Callable[..., object]) -> bool:
    return next(iter(inspect.signature(function).parameters.values())).annotation == "Body"


def check(read: Callable[[Body], object], body: Body) -> None:
    """Run a reader and use what it returns as the server does."""
    try:
        record = read(body)
    except TinkerError as error:
        str(error).encode()
        return
    if isinstance(record, RejectedRequest):
        orjson.dumps(attrs.asdict(record.error))
        return
    if isinstance(record, CreateCustomLossInput):  # its graph is of any depth until the engine has looked at it
        try:
            check_custom_loss(record.loss)
        except TinkerError:
            return
    if isinstance(record, get_args(EngineRequest)):
        _ENCODER.encode(record, type(record))


def proto(data: bytes) -> None:
    """The protobuf form of a pass."""
    check(read_forward_backward, Body(data=data, content_type=PROTOBUF, limit=LIMIT, max_parts=PARTS))


def unpack(data: bytes) -> None:
    """The content encodings; the first byte chooses one."""
    encoding = ("zstd", "gzip", "", "br")[data[0] % 4] if data else "zstd"
    body = Body(data=data[1:], content_encoding=encoding, limit=LIMIT, max_parts=PARTS)
    try:
        plain = body.plain()
    except TinkerError:
        return
    if len(plain) > LIMIT and encoding:
        raise AssertionError(f"{len(plain)} bytes unpacked, beyond the limit of {LIMIT}")


def json_readers(data: bytes) -> None:
    """Every reader of JSON; the first byte chooses one."""
    if data:
        names = sorted(_READERS)
        check(_READERS[names[data[0] % len(names)]], Body(data=data[1:], limit=LIMIT, max_parts=PARTS))


_READERS = readers()

TARGETS: dict[str, Target] = {"proto": proto, "unpack": unpack, "json": json_readers}
"""By name; `tests.fuzz.routes` adds one that runs a whole server."""
