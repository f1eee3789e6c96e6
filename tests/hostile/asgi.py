"""Requests as an ASGI server would hand them to the app, byte for byte: no client library tidies them up."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import unquote

import attrs
import uvicorn
from starlette.applications import Starlette

from tinker_server.serving import open_socket

Headers = Sequence[tuple[bytes, bytes]]

# What an HTTP server refuses to write: uvicorn answers 500 instead.
_HEADER_NAME = re.compile(rb"[\x00-\x1f\x7f()<>@,;:\[\]={} \t\\\"]")
_HEADER_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class InternalError(AssertionError):
    """The app raised, answered 500, or answered what no server could send."""


@attrs.frozen(kw_only=True)
class Answer:
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def header(self, name: str) -> str:
        return next((value.decode("latin-1") for key, value in self.headers if key == name.encode()), "")

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def detail(self) -> str:
        return str(self.json()["detail"])


@attrs.frozen(kw_only=True)
class Call:
    method: str
    target: str
    """Path and query as on the first line of a request: percent-encoded."""
    headers: Headers = ()
    body: bytes = b""
    piece: int = 65536
    host: bool = True
    """Whether to send a good Host header."""


async def send(app: Starlette, call: Call) -> Answer:
    """Run one request through an app; raises `InternalError` for what must never happen."""
    path, _, query = call.target.partition("?")
    pieces = [call.body[start : start + call.piece] for start in range(0, len(call.body), call.piece)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.Event().wait()  # the client stays until it has its answer
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def collect(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [*([(b"host", b"tinker.test")] if call.host else []), *call.headers],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    try:
        await app(scope, receive, collect)
    except Exception as error:
        raise InternalError(f"{call.method} {call.target[:200]}: {type(error).__name__}: {error}") from error
    return _checked(call, sent)


def _checked(call: Call, sent: list[dict[str, Any]]) -> Answer:
    where = f"{call.method} {call.target[:200]}"
    if not sent or sent[0]["type"] != "http.response.start" or sent[-1].get("more_body", False):
        raise InternalError(f"{where}: no whole answer: {sent!r}")
    status, headers = sent[0]["status"], tuple(sent[0].get("headers", ()))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    if status in (500, 501, 502) or (status == 503 and not body):
        raise InternalError(f"{where}: {status} {body!r}")
    for name, value in headers:
        if _HEADER_NAME.search(name) or _HEADER_VALUE.search(value):
            raise InternalError(f"{where}: a header that no server may send: {name!r}: {value!r}")
    answer = Answer(status=status, headers=headers, body=body)
    length = answer.header("content-length")
    if length and call.method != "HEAD" and int(length) != len(body):
        raise InternalError(f"{where}: content-length {length}, but {len(body)} bytes")
    if status >= 400 and call.method != "HEAD" and not body:
        raise InternalError(f"{where}: {status} without a body; clients take it for a broken connection")
    return answer


class Hosted:
    """An app that runs on an event loop of its own, behind blocking calls."""

    def __init__(self, app: Starlette, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self._loop = loop

    def send(self, call: Call, *, patience: float = 20.0) -> Answer:
        """The answer; a request that hangs raises ``TimeoutError``."""
        return self.start(call).result(patience)

    def start(self, call: Call) -> Future[Answer]:
        """Send a request and do not wait for its answer."""
        return asyncio.run_coroutine_threadsafe(send(self.app, call), self._loop)

    @contextmanager
    def listen(self, **options: Any) -> Iterator[tuple[str, int]]:
        """Serve the same app over real HTTP as well; yields host and port. ``options`` go to uvicorn."""
        listener = open_socket("127.0.0.1", 0)
        listener.listen()  # whoever connects before the server has started waits for it
        server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, lifespan="off", ws="none", **options))
        task = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), self._loop)
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            task.result(30)

    def post(self, path: str, body: object, *headers: tuple[bytes, bytes]) -> Answer:
        """Post JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send(Call(method="POST", target=f"/api/v1/{path}", headers=headers, body=content))

    def get(self, path: str) -> Answer:
        return self.send(Call(method="GET", target=f"/api/v1/{path}"))

    def result(self, path: str, body: object, *headers: tuple[bytes, bytes]) -> Any:
        """Submit, and return the JSON that the future resolves to."""
        answer = self.post(path, body, *headers)
        assert answer.status == 200, answer.body
        while True:
            polled = self.post("retrieve_future", {"request_id": answer.json()["request_id"]})
            if polled.status != 408:
                return polled.json()


@contextmanager
def host(app: Starlette) -> Iterator[Hosted]:
    """Run an app, with its lifespan, for the length of a block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    stop, ended, started = asyncio.Event(), Future[None](), Future[None]()

    async def live() -> None:
        try:
            async with _lifespan(app):
                started.set_result(None)
                await stop.wait()
        except BaseException as error:
            (ended if started.done() else started).set_exception(error)
            raise
        ended.set_result(None)

    task = asyncio.run_coroutine_threadsafe(live(), loop)
    try:
        started.result(60)
        yield Hosted(app, loop)
    finally:
        loop.call_soon_threadsafe(stop.set)
        try:
            task.result(60)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(120)
            loop.close()


@asynccontextmanager
async def _lifespan(app: Starlette) -> Any:
    async with app.router.lifespan_context(app):
        yield
