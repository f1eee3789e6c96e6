"""A TCP relay in front of a server that cuts off the first stream in the middle of an event, or refuses it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import attrs

BUSY = b'HTTP/1.1 503 Service Unavailable\r\ncontent-length: 24\r\n\r\n{"detail":"starting up"}'


@attrs.define
class CuttingRelay:
    """What went through it."""

    url: str
    upstream: tuple[str, int]
    is_busy: bool
    """Whether the first stream is refused instead of cut off."""
    streams: list[bytes] = attrs.field(factory=list)
    """The requests for streams, with their headers."""

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # closed at the end of the test
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.upstream) as server:
            is_cut = threading.Event()
            threading.Thread(target=self._forward, args=(client, server, is_cut), daemon=True).start()
            answer = b""
            while data := server.recv(65536):
                if not is_cut.is_set():
                    client.sendall(data)
                    continue
                answer += data
                head, _, body = answer.partition(b"\r\n\r\n")
                event, end, _ = body.partition(b"\n\n")
                if end:
                    # One event, and then less than another.
                    client.sendall(head + b"\r\n\r\n" + event + end + b"\r\n20\r\nid: 99")
                    client.shutdown(socket.SHUT_RDWR)
                    return

    def _forward(self, client: socket.socket, server: socket.socket, is_cut: threading.Event) -> None:
        """What the client sends; its requests are small enough to arrive in one piece."""
        try:
            while request := client.recv(65536):
                if b"/logs/stream HTTP" in request:
                    self.streams.append(request)
                    if len(self.streams) == 1 and self.is_busy:
                        client.sendall(BUSY)
                        continue
                    if len(self.streams) == 1:
                        is_cut.set()
                server.sendall(request)
        except OSError:
            return  # the other direction has been cut off


@contextmanager
def cutting_relay(url: str, *, is_busy: bool = False) -> Iterator[CuttingRelay]:
    """In front of a server, until the end of the block."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = CuttingRelay(f"http://127.0.0.1:{listener.getsockname()[1]}", (host, int(port)), is_busy)
        threading.Thread(target=relay.serve, args=(listener,), daemon=True).start()
        yield relay
