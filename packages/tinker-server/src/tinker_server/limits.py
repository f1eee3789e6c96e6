"""How much one server takes from the network: bytes, parts, time and connections."""

from __future__ import annotations

import attrs

MIB = 1024 * 1024


@attrs.frozen(kw_only=True)
class Limits:
    """Bounds on what clients send. The defaults leave the official client room many times over.

    Each field is a flag of the server; `docs/explanation/security.md` says what each defends.
    """

    body_limit: int = 256 * MIB
    """Most bytes of the body of a pass or a sample request, before and after decompression."""
    control_body_limit: int = 4 * MIB
    """Most bytes of every other body."""
    body_memory: int = 1024 * MIB
    """Bytes of bodies that are held at once while they arrive and are decoded; one more body may exceed it."""
    body_timeout: float = 60.0
    """Seconds a body may take to arrive, besides what its bytes earn at ``body_min_rate``."""
    body_min_rate: int = 16 * 1024
    """Bytes per second that a large body must keep up with."""
    request_parts: int = 64 * 1024
    """Most data, chunks, tensors and spans of one request together."""
    header_limit: int = 64 * 1024
    """Most bytes of a request's first line and headers together."""
    header_timeout: float = 30.0
    """Seconds from a connection's, or a request's, first byte to the end of its headers."""
    max_connections: int = 16 * 1024
    """Most open connections, and most requests in progress; a long poll counts as both."""
    max_open_polls: int = 12 * 1024
    """Most polls that wait for results as long as they may; they shall not take up all connections."""


DEFAULT_LIMITS = Limits()
"""What a server without flags defends."""
