"""HTTP/1.1 as uvicorn speaks it, with bounds on what uvicorn leaves open: header bytes, header time, connections."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tinker_server.limits import Limits

MAX_HEADERS = 256
"""Most headers of one request; clients send about thirty."""
MAX_PIPELINED = 16
"""Most requests that wait on one connection for the answer to an earlier one; clients send none ahead."""
MAX_COMPLAINTS = 100
"""How often a broken request is logged, by kind."""
LINGER_SECONDS = 10.0
"""How long the rest of a request is awaited that has its answer already."""


def _answer(status: str, detail: str) -> bytes:
    body = f'{{"detail": "{detail}"}}'
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}retry-after: 1\r\nconnection: close\r\n\r\n{body}".encode()


_HEAD_TOO_LARGE = _answer("431 Request Header Fields Too Large", "the headers exceed --header-limit; send fewer")


def make_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The protocol class for ``uvicorn.Config(http=...)``."""

    class LimitedProtocol(BoundedProtocol):
        bounds = limits

    return LimitedProtocol


class RefusalFilter(logging.Filter):
    """Lets uvicorn complain of broken requests a hundred times by kind: strangers must not fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record."""
        if record.levelno != logging.WARNING or not isinstance(record.msg, str):
            return True
        self._counts[record.msg] += 1
        if self._counts[record.msg] == MAX_COMPLAINTS:
            record.msg += " (this is logged no more)"
        return self._counts[record.msg.removesuffix(" (this is logged no more)")] <= MAX_COMPLAINTS


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Whoever lets it wait within a request, or sends more than a request may hold, is cut off.

    A body's size and pace are for the app to watch, once it reads the body. A body that it does not read is for us.
    """

    bounds: ClassVar[Limits]

    _deadline: asyncio.TimerHandle | None = None
    _in_head = False
    _in_message = False
    _head_size = 0
    """Bytes of the first line and headers so far, complete ones only."""
    _num_headers = 0
    _outside = 0
    """Bytes that arrived since the last piece of a body or the last end of a request."""
    _head_too_large = False
    _unsent = 0
    """Bytes of the answer that the client had not read when we last looked."""
    _reader_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or end it when there are too many.

        It gets no answer: clients ask again at once for a result after every status that is not final, but they wait
        longer and longer after a connection that failed, in all releases.
        """
        if len(self.connections) >= self.bounds.max_connections:
            self.transport = transport
            transport.abort()
            self.logger.warning("refused a connection: there are --max-connections of them")
            return
        super().connection_made(transport)
        self._set_deadline(self.bounds.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._drop_deadline()
        self._drop_reader_check()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived."""
        was_idle = not self._in_message and self.timeout_keep_alive_task is not None
        self._outside += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._outside > self.bounds.header_limit:
            self._refuse_head()
        elif was_idle and not self._in_message and self._outside:
            # Line ends between two requests: they are allowed, but must not keep the connection open for ever.
            self._set_deadline(self.bounds.header_timeout)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or more of it than is allowed."""
        if self._head_too_large:
            self.transport.write(_HEAD_TOO_LARGE)
            self.transport.close()
        else:
            super().send_400_response(msg)

    # --- what the parser reports --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._head_size = self._num_headers = 0
        if self._deadline is None:
            self._set_deadline(self.bounds.header_timeout)

    def on_url(self, url: bytes) -> None:
        """A piece of the first line."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one trailer behind a body."""
        self._num_headers += 1
        self._count_head(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self.bounds.header_limit or self._num_headers > MAX_HEADERS:
            self._head_too_large = True
            raise ValueError("too many or too large headers")  # the parser turns it into a call of send_400_response

    def on_headers_complete(self) -> None:
        """The request can begin."""
        self._in_head = False
        self._drop_deadline()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many pipelined requests")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._outside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._in_message = False
        self._outside = 0
        self._drop_deadline()
        super().on_message_complete()
        if self.cycle.response_complete and not self.pipeline:  # its data has ended the wait for the next request
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """The answer is written; if the request is not whole even now, the rest of it must come soon."""
        super().on_response_complete()
        if self._in_message and not self._in_head and not self.pipeline and not self.transport.is_closing():
            self._set_deadline(LINGER_SECONDS)

    # --- slow readers -------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._reader_check = self.loop.call_later(self.bounds.body_timeout, self._check_reader)

    def resume_writing(self) -> None:
        """The client has read most of what we wrote."""
        self._drop_reader_check()
        super().resume_writing()

    def _check_reader(self) -> None:
        """Cut off a client that reads an answer more slowly than it would have to send a body."""
        unsent = self.transport.get_write_buffer_size()
        if self._unsent - unsent < self.bounds.body_min_rate * self.bounds.body_timeout:
            self.transport.abort()
            return
        self._unsent = unsent
        self._reader_check = self.loop.call_later(self.bounds.body_timeout, self._check_reader)

    def _drop_reader_check(self) -> None:
        if self._reader_check is not None:
            self._reader_check.cancel()
            self._reader_check = None

    # --- time ---------------------------------------------------------------------------------------------------------

    def _set_deadline(self, seconds: float) -> None:
        self._drop_deadline()
        self._deadline = self.loop.call_later(seconds, self._cut_off)

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut_off(self) -> None:
        self._deadline = None
        self.transport.close()

    def _refuse_head(self) -> None:
        self._head_too_large = True
        self.send_400_response("")
