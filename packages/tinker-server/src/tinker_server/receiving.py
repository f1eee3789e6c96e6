"""Receiving a request's body: bounded in size, in time, and in what all bodies together hold."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Iterator

from starlette.requests import Request

from tinker_core.errors import TinkerError, UserError
from tinker_server.limits import Limits
from tinker_server.wire.body import BodyTooLargeError


class SlowBodyError(UserError):
    """A body that arrives more slowly than the server waits."""


class ServerBusyError(TinkerError):
    """More request bodies at once than the server has memory for; sending it again later helps."""


class Lease:
    """The share of one body in a `BodyMemory`."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.size = 0

    async def grow(self, size: int, patience: float) -> None:
        """Hold ``size`` bytes more; raises `ServerBusyError` when ``patience`` seconds bring no room."""
        await self._memory.grow(self, size, patience)


class BodyMemory:
    """Bytes of all bodies that are being received or decoded.

    The oldest body may always grow, so that bodies that wait for each other's room cannot stand still for ever.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._leases: dict[Lease, None] = {}
        self._waiting: dict[asyncio.Future[None], tuple[Lease, int]] = {}
        self.held = 0

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease]:
        """A share that is given back at the end of the block."""
        lease = Lease(self)
        self._leases[lease] = None
        try:
            yield lease
        finally:
            del self._leases[lease]
            self.held -= lease.size
            self._wake()

    async def grow(self, lease: Lease, size: int, patience: float) -> None:
        """See `Lease.grow`."""
        if not self._fits(lease, size):
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[room] = (lease, size)
            try:
                async with asyncio.timeout(patience):
                    await room
            except TimeoutError:
                raise ServerBusyError(
                    "the server holds as many request bodies as it has memory for; send the request again later"
                ) from None
            finally:
                self._waiting.pop(room, None)
            return
        self._take(lease, size)

    def _fits(self, lease: Lease, size: int) -> bool:
        return self.held + size <= self._limit or next(iter(self._leases)) is lease

    def _take(self, lease: Lease, size: int) -> None:
        lease.size += size
        self.held += size

    def _wake(self) -> None:
        for room, (lease, size) in list(self._waiting.items()):
            if not room.done() and self._fits(lease, size):
                self._take(lease, size)
                room.set_result(None)


async def receive(request: Request, limit: int, limits: Limits, lease: Lease) -> bytes:
    """The bytes of a request's body.

    Raises `BodyTooLargeError`, `SlowBodyError`, `ServerBusyError`, and Starlette's ``ClientDisconnect``.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise _too_large(limit, limits)
    first, rest = b"", io.BytesIO()
    total = 0
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        async with asyncio.timeout(limits.body_timeout) as deadline:
            async for part in request.stream():
                if not part:
                    continue
                total += len(part)
                if total > limit:
                    raise _too_large(limit, limits)
                waiting_since = loop.time()
                deadline.reschedule(None)
                await lease.grow(len(part), limits.body_timeout)
                if total == len(part):
                    first = part
                else:  # a buffer, because a list of tiny parts would take many times their bytes
                    rest.write(part if rest.tell() else first + part)
                started += loop.time() - waiting_since  # the client is not to blame for our lack of memory
                deadline.reschedule(started + limits.body_timeout + total / limits.body_min_rate)
    except TimeoutError:
        raise SlowBodyError(
            f"the request body did not arrive in time: {total} bytes in {loop.time() - started:.0f} s; the server "
            f"waits {limits.body_timeout:g} s and a second more for every {limits.body_min_rate} bytes"
        ) from None
    return rest.getvalue() if rest.tell() else first


def _too_large(limit: int, limits: Limits) -> BodyTooLargeError:
    return BodyTooLargeError(limit, "--body-limit" if limit == limits.body_limit else "--control-body-limit")
