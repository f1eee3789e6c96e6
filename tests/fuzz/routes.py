"""The fuzz target ``routes``: bytes become a request, or several, to an app with the fake backend."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from tests.fuzz.targets import Target
from tests.hostile.asgi import Call, Hosted, host
from tests.hostile.examples import PARAMETERS, Endpoint, endpoints, fill, prepare
from tests.hostile.strategies import NASTY_TEXTS
from tinker_core.engine import Engine, EngineConfig
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import BaseModelSpec
from tinker_server.app import create_app
from tinker_server.limits import Limits
from tinker_server.wire.body import PROTOBUF

HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-type", PROTOBUF.encode()),
    (b"content-encoding", b"zstd"),
    (b"content-encoding", b"gzip"),
    (b"accept", PROTOBUF.encode()),
    (b"host", b"[::1"),
    (b"content-length", b"\xb2"),
    (b"x-tinker-weights-access-token", b"t"),
]
_REFRESH = 20_000
"""Requests after which a new app takes over: what clients make is kept, and would only grow here."""


class Router:
    """Turns bytes into requests. Byte 0 is the route, 1 the method, 2 the parameters, 3 the headers, 4 the query."""

    def __init__(self, hosted: Hosted) -> None:
        self._hosted = hosted
        self._ids = prepare(hosted)
        self._endpoints = sorted(endpoints(hosted.app), key=str)

    def run(self, data: bytes) -> None:
        """Send one request."""
        choices, body = data[:5].ljust(5, b"\0"), data[5:]
        endpoint = self._endpoints[choices[0] % len(self._endpoints)]
        call = Call(
            method=endpoint.methods[choices[1] % len(endpoint.methods)],
            target=self._target(endpoint, choices[2], choices[4], body),
            headers=tuple(header for bit, header in enumerate(HEADERS) if choices[3] >> bit & 1),
            body=fill_bytes(body, self._ids) if endpoint.takes_body else b"",
        )
        answer = self._hosted.send(call)
        if answer.status == 200 and answer.body.startswith(b'{"request_id"') and call.method == "POST":
            polled = self._hosted.post("retrieve_future", {"request_id": answer.json()["request_id"]})
            if polled.status == 200 and polled.json().get("category") == "server":
                raise AssertionError(polled.body)

    def _target(self, endpoint: Endpoint, choice: int, query: int, body: bytes) -> str:
        path = endpoint.path
        for name in endpoint.parameters:
            options = [fill(text, self._ids) for text in PARAMETERS[name]] * 3 + NASTY_TEXTS
            value = options[choice % len(options)] if choice < 240 else body.decode("utf-8", "replace")[:500]
            path = path.replace(f"{{{name}:path}}", quote(value[:2000])).replace(f"{{{name}}}", quote(value[:2000]))
        return path + (f"?limit={query}&offset={quote(body[:30])}&cursor={query}" if query else "")


def fill_bytes(body: bytes, ids: dict[str, str]) -> bytes:
    """`fill` for any bytes."""
    for name in sorted(ids, key=len, reverse=True):
        body = body.replace(f"${name}".encode(), json.dumps(ids[name])[1:-1].encode())
    return body


@contextlib.contextmanager
def _router() -> Iterator[Router]:
    plugins = Plugins.load("core", FAKE_PLUGIN)
    with tempfile.TemporaryDirectory() as directory:
        config = EngineConfig(
            base_models=(BaseModelSpec(name="tiny", path="tiny"),),
            data_dir=Path(directory) / "data",
            backend="fake",
            sampler="fake",
            plugins=(FAKE_PLUGIN,),
            max_models=100_000,
        )
        limits = Limits(body_limit=1024 * 1024, control_body_limit=256 * 1024, request_parts=2000, body_timeout=1.0)
        app = create_app(Engine(config, plugins), plugins=plugins, poll_seconds=0.01, limits=limits)
        with host(app) as hosted:
            yield Router(hosted)


class Routes:
    """The target: one app after the other."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._start()

    def __call__(self, data: bytes) -> None:
        """Send one request to an app that has not served too many before."""
        if self._left == 0:
            self._start()
        self._left -= 1
        self._router.run(data)

    def _start(self) -> None:
        self._stack.close()
        self._router = self._stack.enter_context(_router())
        self._left = _REFRESH


def make_routes() -> Target:
    """A fresh target."""
    return Routes()
