"""The socket that an engine listens at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq
import zmq.asyncio

from tinker_core.errors import ConfigurationError
from tinker_sampler_vllm.protocol import MAX_CALL_BYTES
from tinker_sampler_vllm.security import secure_server

_LINGER_MILLISECONDS = 2000


@contextmanager
def listening(address: str, secret: str | None) -> Iterator[Any]:
    """A ROUTER socket bound to ``ipc://`` in a private directory, or to ``tcp://`` for those with the secret.

    Raises `ConfigurationError` for an address where it cannot listen, and for ``tcp://`` without a secret.
    """
    on_network = not address.startswith("ipc://")
    if on_network and secret is None:
        raise ConfigurationError(f"an engine at {address} needs a secret: anybody could use it")
    with (
        zmq.asyncio.Context() as context,
        context.socket(zmq.ROUTER) as socket,
        secure_server(context, socket, secret),
    ):
        socket.setsockopt(zmq.LINGER, _LINGER_MILLISECONDS)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.setsockopt(zmq.IPV6, "[" in address)
        # A socket of this kind drops what does not fit into its queues, and nobody would ever miss the answer.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        if on_network:
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_CALL_BYTES + 1024)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigurationError(f"cannot listen at {address}: {error.strerror}") from error
        yield socket
