"""A real HTTP server under slow, endless and countless requests."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.server import ServerState

from tests.hostile.conftest import Target
from tests.hostile.examples import endpoints
from tests.serving import serve_in_thread
from tinker_server import protocol
from tinker_server.limits import Limits
from tinker_server.protocol import MAX_HEADERS, make_protocol

LIMITS = Limits(header_limit=16 * 1024, header_timeout=0.3, max_connections=20, body_timeout=0.3, body_min_rate=1000)
LARGE = bytes(20 * 1024 * 1024)


async def echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def ignore(request: Request) -> Response:
    return PlainTextResponse("ignored", status_code=418)


async def large(_: Request) -> Response:
    return Response(LARGE)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    routes = [
        Route("/echo", echo, methods=["POST"]),
        Route("/ignore", ignore, methods=["GET", "POST"]),
        Route("/large", large, methods=["GET"]),
    ]
    app = Starlette(routes=routes)
    with serve_in_thread(app, http=make_protocol(LIMITS), timeout_keep_alive=60) as url:
        parts = httpx.URL(url)
        yield parts.host, parts.port or 80


@contextmanager
def connected(address: tuple[str, int], data: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=120) as raw:
        raw.sendall(data)
        yield raw


def read_all(raw: socket.socket) -> bytes:
    """What comes until the server closes; a server that does not close fails by the socket's time-out."""
    parts = []
    while True:
        try:
            part = raw.recv(65536)
        except ConnectionResetError:
            part = b""
        if not part:
            return b"".join(parts)
        parts.append(part)


def read_until(raw: socket.socket, end: bytes) -> bytes:
    """What comes until it ends so."""
    data = b""
    while not data.endswith(end):
        part = raw.recv(65536)
        assert part, data
        data += part
    return data


POST = b"POST /echo HTTP/1.1\r\nhost: x\r\n"


def test_a_good_request_on_a_kept_connection(address: tuple[str, int]) -> None:
    with connected(address) as raw:
        for size in (3, 100_000):
            raw.sendall(POST + b"content-length: %d\r\n\r\n" % size + bytes(size))
            assert read_until(raw, b"\r\n\r\n%d" % size).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n",
        b"P",
        b"POST /ec",
        POST,
        POST + b"x-a: b",
        b"GET /ignore HTTP/1.1\r\nhost: x\r\n\r\nGET /ig",
    ],
)
def test_headers_that_never_end_are_cut_off(address: tuple[str, int], data: bytes) -> None:
    with connected(address, data) as raw:
        assert read_all(raw).count(b"HTTP/1.1 ") == data.count(b"GET /ignore")


def test_line_ends_between_requests_keep_no_connection_open(address: tuple[str, int]) -> None:
    with connected(address, b"GET /ignore HTTP/1.1\r\nhost: x\r\n\r\n") as raw:
        read_until(raw, b"ignored")
        raw.sendall(b"\r\n\r\n")
        assert read_all(raw) == b""


@pytest.mark.parametrize(
    "head",
    [
        b"POST /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n",
        POST + b"x-long: " + b"a" * 40_000 + b"\r\n",
        POST + b"x-long: " + b"a" * 2_000_000,
        POST + b"".join(b"x-%d: 1\r\n" % number for number in range(2 * MAX_HEADERS)),
        POST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n" + b"x-trailer: " + b"a" * 40_000 + b"\r\n",
    ],
)
def test_too_many_or_too_large_headers(address: tuple[str, int], head: bytes) -> None:
    with connected(address) as raw:
        try:
            raw.sendall(head + b"\r\n")
        except ConnectionError:
            return
        assert read_all(raw)[:12] in (b"HTTP/1.1 431", b"")


@pytest.mark.parametrize(
    "head",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"content-length: -1\r\n\r\n",
        POST + b"content-length: 99999999999999999999999\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffffff\r\n",
        POST + b"x y: 1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(address: tuple[str, int], head: bytes) -> None:
    with connected(address, head) as raw:
        assert read_all(raw).startswith(b"HTTP/1.1 400")


def test_pipelining_has_an_end(address: tuple[str, int]) -> None:
    with connected(address, b"GET /ignore HTTP/1.1\r\nhost: x\r\n\r\n" * 1000) as raw:
        assert read_all(raw).count(b"HTTP/1.1 418") <= 2 * protocol.MAX_PIPELINED


def test_the_rest_of_an_answered_request_is_awaited_but_not_for_ever(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b"POST /ignore HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\n"
    with connected(address, head + b"abc") as raw:
        assert read_until(raw, b"ignored").startswith(b"HTTP/1.1 418")
        raw.sendall(b"def" + head + b"abcdef")
        assert read_until(raw, b"ignored").startswith(b"HTTP/1.1 418")
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.2)
    with connected(address, head + b"abc") as raw:
        assert read_all(raw).startswith(b"HTTP/1.1 418")


class Pipe(asyncio.Transport):
    """The server's end of a connection whose other end reads so many bytes each time that somebody looks."""

    def __init__(self, unread: int, pace: int) -> None:
        super().__init__()
        self.unread, self.pace = unread, pace
        self.aborted = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        self.unread = max(0, self.unread - self.pace)
        return self.unread

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("pace", "left"), [(0, 10_000), (4, 9_992), (1000, 0)])
def test_a_client_that_does_not_read_is_given_up(pace: int, left: int) -> None:
    async def run() -> None:
        pipe = Pipe(10_000, pace)
        config = uvicorn.Config(Starlette(), log_config=None)
        make: Any = make_protocol(Limits(body_timeout=0.01, body_min_rate=1000))
        made = make(config=config, server_state=ServerState(), app_state={})
        made.connection_made(pipe)
        made.pause_writing()
        await asyncio.wait_for(pipe.aborted.wait(), 20)
        assert pipe.unread <= left
        made.connection_lost(None)

    asyncio.run(run())


def test_a_large_answer_is_read_whole(address: tuple[str, int]) -> None:
    with connected(address, b"GET /large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n") as raw:
        assert len(read_all(raw)) > len(LARGE)


def test_too_many_connections_are_ended_at_once(address: tuple[str, int]) -> None:
    kept = []
    try:
        for _ in range(LIMITS.max_connections):
            raw = socket.create_connection(address, timeout=120)
            kept.append(raw)
            raw.sendall(b"GET /ignore HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_until(raw, b"ignored").startswith(b"HTTP/1.1 418")
        with connected(address) as refused:
            assert read_all(refused) == b"", "no status would make a client that polls wait"
        kept.pop().close()
        assert_accepted(address)
    finally:
        for raw in kept:
            raw.close()


def assert_accepted(address: tuple[str, int]) -> None:
    """The server notices in its own time that a connection has gone."""
    for _ in range(1000):
        with connected(address, b"GET /ignore HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n") as raw:
            if read_all(raw).startswith(b"HTTP/1.1 418"):
                return
    raise AssertionError("no connection is accepted")


def test_broken_requests_do_not_fill_the_log() -> None:
    complain = protocol.RefusalFilter().filter
    records = [logging.makeLogRecord({"levelno": logging.WARNING, "msg": "Invalid HTTP request."}) for _ in range(500)]
    logged = [record.msg for record in records if complain(record)]
    assert len(logged) == protocol.MAX_COMPLAINTS
    assert logged[-1].endswith("logged no more)")
    assert complain(logging.makeLogRecord({"levelno": logging.ERROR, "msg": "Invalid HTTP request."}))


# --- bodies, through the whole app ------------------------------------------------------------------------------------


@pytest.fixture
def listening(target: Target) -> Iterator[tuple[str, int]]:
    """The app of the other hostile tests behind real HTTP."""
    with target.hosted.listen(http=make_protocol(Limits())) as address:
        yield address


def test_a_slow_body_is_given_up(listening: tuple[str, int]) -> None:
    head = b"POST /api/v1/asample HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
    with connected(listening, head + b"{") as raw:
        answer = read_until(raw, b"}")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive in time" in answer


def test_a_body_that_breaks_off_hurts_nobody(listening: tuple[str, int], target: Target) -> None:
    with connected(listening, b"POST /api/v1/asample HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"):
        pass
    target.probe()


def test_every_route_answers_nonsense_over_sockets(listening: tuple[str, int], target: Target) -> None:
    with httpx.Client(base_url=f"http://{listening[0]}:{listening[1]}", timeout=120) as http:
        for endpoint in endpoints(target.hosted.app):
            path = endpoint.path.replace(":path}", "}").replace("{", "").replace("}", "")
            for method in endpoint.methods:
                body = b"\x00\xff{" if endpoint.takes_body else None
                assert http.request(method, path, content=body).status_code != 500, f"{method} {path}"
    target.probe()
