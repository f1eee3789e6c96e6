"""A recording proxy between the SDK and the server: what was asked, what was answered, and when to kill.

It passes requests on one by one and byte for byte. When the server's side of a connection breaks, so does the client's:
the SDK sees the same resets that it would see without the proxy. What happens for the first time counts as a *moment*,
so that two runs of one script have the same moments, however often requests are repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Self

import attrs
import h11

SUBMISSIONS = frozenset(
    {
        "create_session", "create_model", "create_sampling_session", "get_info", "forward_backward", "optim_step",
        "save_weights", "save_weights_for_sampler", "load_weights", "asample",
    }
)  # fmt: skip
"""Requests whose moments count. Heartbeats, telemetry and whatever else depends on time do not."""
ARRIVING, SENT, ANSWERED, RESOLVED = PHASES = ("arriving", "sent", "answered", "resolved")
"""Before the server sees a request; while it works; before the client sees the answer; and a result, likewise."""

OnMoment = Callable[[int, str], bool]
"""Called in the proxy's thread with the number of the moment, from 1, and its phase; True breaks the connection."""


@attrs.frozen(kw_only=True)
class Exchange:
    """One request and, once it is there, its response."""

    method: str
    target: str
    accept: bytes
    body: bytes

    @property
    def name(self) -> str:
        """The endpoint."""
        return self.target.partition("?")[0].rpartition("/")[2]

    @property
    def identity(self) -> str:
        """Equal for repeats of one request, and for nothing else."""
        return hashlib.sha256(self.target.encode() + b"\0" + self.body).hexdigest()


@attrs.define
class Ledger:
    """What went through the proxy."""

    accepted: dict[str, str] = attrs.field(factory=dict)
    """Endpoint by request id, of all requests that were acknowledged to the client."""
    receipts: defaultdict[str, set[str]] = attrs.field(factory=lambda: defaultdict(set))
    """Request ids by identity of the request: one each, however often it was sent."""
    delivered: defaultdict[tuple[str, bytes], set[str]] = attrs.field(factory=lambda: defaultdict(set))
    """Digests of results by request id and Accept: one each."""
    failed: dict[str, str] = attrs.field(factory=dict)
    """Errors by request id, of futures that failed."""
    statuses: Counter[tuple[str, int]] = attrs.field(factory=Counter)
    """Answers by endpoint and status."""

    def note(self, exchange: Exchange, status: int, body: bytes, *, sent: bool) -> None:
        """Remember a response; ``sent`` is whether the client got it."""
        self.statuses[exchange.name, status] += 1
        if status != 200:
            return
        if exchange.name == "retrieve_future":
            request_id = json.loads(exchange.body)["request_id"]
            if body.startswith(b"{"):
                answer = json.loads(body)
                if answer.get("type") == "try_again" or answer.get("status") == "complete_metadata":
                    return
                if "error" in answer:
                    self.failed[request_id] = answer["error"]
            if sent:
                self.delivered[request_id, exchange.accept].add(hashlib.sha256(body).hexdigest())
        elif exchange.name in SUBMISSIONS and body.startswith(b"{"):
            request_id = json.loads(body).get("request_id")
            if request_id is not None and sent:
                self.accepted[request_id] = exchange.name
                self.receipts[exchange.identity].add(request_id)


class BrokenError(Exception):
    """One side of a connection is gone, or is to go."""


class Side:
    """One HTTP/1.1 connection, as server or as client."""

    def __init__(
        self, role: type[h11.CLIENT] | type[h11.SERVER], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.http = h11.Connection(role, max_incomplete_event_size=1024 * 1024)
        self._reader = reader
        self.writer = writer

    async def message(self) -> tuple[h11.Request | h11.Response, bytes]:
        """The next whole request or response; raises `BrokenError` when the connection ends before it."""
        head: h11.Request | h11.Response | None = None
        pieces = []
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                try:
                    data = await self._reader.read(1024 * 1024)
                except OSError as error:
                    raise BrokenError from error
                self.http.receive_data(data)
                if not data and head is None:
                    raise BrokenError
            elif isinstance(event, h11.Request | h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                pieces.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                return head, b"".join(pieces)
            elif not isinstance(event, h11.InformationalResponse):
                raise BrokenError

    async def send(self, head: h11.Request | h11.Response, body: bytes) -> None:
        """Write a whole message."""
        events = [head, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
        try:
            self.writer.write(b"".join(self.http.send(event) or b"" for event in events))
            await self.writer.drain()
        except OSError as error:
            raise BrokenError from error

    def close(self) -> None:
        """End the connection."""
        self.writer.close()


class Proxy:
    """A context manager that listens in a thread of its own; ``url`` is where, ``ledger`` what went through."""

    def __init__(self, port: int, on_moment: OnMoment | None = None) -> None:
        self.ledger = Ledger()
        self.num_moments = 0
        self.url = ""
        self._upstream = port
        self._on_moment = on_moment
        self._seen: set[tuple[str, str]] = set()
        self._started = threading.Event()
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=120)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            task.add_done_callback(connections.discard)
            with contextlib.suppress(BrokenError, h11.ProtocolError, asyncio.CancelledError):
                await self._connection(Side(h11.SERVER, reader, writer))
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=4 * 1024 * 1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, client: Side) -> None:
        """One connection of the client, and one of ours to the server for as long as both live."""
        server: Side | None = None
        try:
            while True:
                head, body = await self._next(client, server)
                assert isinstance(head, h11.Request)
                exchange = _exchange(head, body)
                self._moment(exchange, ARRIVING)
                if server is None:
                    server = await self._connect()
                await server.send(head, body)
                self._moment(exchange, SENT)
                response, content = await server.message()
                assert isinstance(response, h11.Response)
                await self._answer(client, exchange, response, content)
                for side in (client, server):
                    side.http.start_next_cycle()
        finally:
            if server is not None:
                server.close()

    async def _next(self, client: Side, server: Side | None) -> tuple[h11.Request | h11.Response, bytes]:
        """The client's next request, unless the server closes its idle connection first."""
        asking = asyncio.create_task(client.message())
        closing = asyncio.create_task(server.message()) if server is not None else None
        try:
            await asyncio.wait([asking, *([closing] if closing else [])], return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise BrokenError
            return asking.result()
        finally:
            for task in (asking, closing):
                if task is not None and not task.done():
                    task.cancel()
                if task is not None:
                    await asyncio.wait([task])
                    if not task.cancelled():
                        task.exception()

    async def _connect(self) -> Side:
        try:
            return Side(h11.CLIENT, *await asyncio.open_connection("127.0.0.1", self._upstream, limit=4 * 1024 * 1024))
        except OSError as error:
            raise BrokenError from error

    async def _answer(self, client: Side, exchange: Exchange, response: h11.Response, body: bytes) -> None:
        phase = RESOLVED if exchange.name == "retrieve_future" else ANSWERED
        try:
            if response.status_code == 200:
                self._moment(exchange, phase)
            await client.send(response, body)
        except BrokenError:
            self.ledger.note(exchange, response.status_code, body, sent=False)
            raise
        self.ledger.note(exchange, response.status_code, body, sent=True)

    def _moment(self, exchange: Exchange, phase: str) -> None:
        counts = exchange.name == "retrieve_future" if phase == RESOLVED else exchange.name in SUBMISSIONS
        if not counts or (phase, exchange.identity) in self._seen:
            return
        self._seen.add((phase, exchange.identity))
        self.num_moments += 1
        if self._on_moment is not None and self._on_moment(self.num_moments, phase):
            raise BrokenError


def _exchange(head: h11.Request, body: bytes) -> Exchange:
    accept = next((value for name, value in head.headers if name == b"accept"), b"")
    return Exchange(method=head.method.decode(), target=head.target.decode(), accept=accept, body=body)
