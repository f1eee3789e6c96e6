"""What every route works with: the engine, the caller's identity, the request body, and the way out of a long poll."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import attrs
import orjson
from starlette.requests import Request
from starlette.responses import Response

from tinker_core.engine import Engine
from tinker_core.errors import InvalidRequestError
from tinker_core.types import Caller
from tinker_server.auth import caller_of
from tinker_server.client_flags import ClientFlags
from tinker_server.limits import Limits
from tinker_server.prices import Prices
from tinker_server.receiving import BodyMemory, receive
from tinker_server.signing import Signer
from tinker_server.tokens import Tokens
from tinker_server.wire.body import JSON, Body

_T = TypeVar("_T")

MAX_PAGE = 1000
"""Most items of one page of a listing."""
_MAX_COUNT = 2**63 - 1
_OWNED, _ACCESSIBLE = "owned", "accessible"
_LARGE_DECODES = 2
"""Large bodies that are decoded at once. More would be no faster, and each takes many times its bytes meanwhile."""


CROWDED_POLL_SECONDS = 2.0
"""How long a poll may wait that finds as many others as there may be."""


class PollGate:
    """Long polls in progress. Closing it ends them at once, so that a server that stops need not wait for them."""

    def __init__(self) -> None:
        self._polls: set[asyncio.Task[Any]] = set()
        self._ended: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def wait(self, poll: Coroutine[Any, Any, _T]) -> _T | None:
        """The poll's own result, or None once the gate is closed."""
        if self._closed:
            poll.close()
            return None
        task = asyncio.create_task(poll)
        self._polls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if task in self._ended:
                return None
            raise
        finally:
            self._polls.discard(task)
            self._ended.discard(task)

    @property
    def num_open(self) -> int:
        """Polls in progress."""
        return len(self._polls)

    def close(self) -> None:
        """End all polls, and all that begin later."""
        self._closed = True
        self._ended |= self._polls
        for task in self._polls:
            task.cancel()


@attrs.frozen(kw_only=True)
class Services:
    """Shared by all routes of one app."""

    engine: Engine
    poll_seconds: float
    limits: Limits
    gate: PollGate
    signer: Signer
    public_url: str | None
    """Where clients reach the server, when it is not where their requests seem to go."""
    tokens: Tokens
    prices: Prices
    jwt_auth: bool
    """Whether clients are told to exchange their API key for a token."""
    flags: ClientFlags
    _memory: BodyMemory = attrs.field(
        init=False, default=attrs.Factory(lambda self: BodyMemory(self.limits.body_memory), takes_self=True)
    )
    _large_decodes: asyncio.Semaphore = attrs.field(init=False, factory=lambda: asyncio.Semaphore(_LARGE_DECODES))

    def poll_patience(self) -> float:
        """Seconds that one more long poll may wait for its result.

        Clients ask again at once after every answer that they do not take for final, so a poll too many has to wait
        here, if for less long; whoever else wants its connection may then have it.
        """
        crowded = self.gate.num_open >= self.limits.max_open_polls
        return min(CROWDED_POLL_SECONDS, self.poll_seconds) if crowded else self.poll_seconds

    def caller(self, request: Request) -> Caller:
        """Who sent it, with which key."""
        return caller_of(request)

    def owner(self, request: Request) -> str:
        """Whose request it is."""
        return caller_of(request).owner

    async def read(self, request: Request, reader: Callable[[Body], _T], *, carries_data: bool = False) -> _T:
        """Receive the body and decode it; large ones are decoded off the event loop.

        Only a request that ``carries_data``, for training or sampling, may be larger than the limit of control bodies.
        """
        limits = self.limits
        limit = limits.body_limit if carries_data else min(limits.control_body_limit, limits.body_limit)
        with self._memory.lease() as lease:
            body = Body(
                data=await receive(request, limit, limits, lease),
                content_type=request.headers.get("content-type", JSON),
                content_encoding=request.headers.get("content-encoding", ""),
                limit=limit,
                max_parts=limits.request_parts,
            )
            if not body.is_large:
                return reader(body)
            async with self._large_decodes:
                return await asyncio.to_thread(reader, body)


def answer(value: object, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(value), status_code=status, media_type=JSON)


def page_of(request: Request, default_limit: int) -> tuple[int, int]:
    """``limit`` and ``offset`` of a listing."""
    limit = _count(request, "limit", default_limit)
    if limit > MAX_PAGE:
        raise InvalidRequestError(f"limit must be at most {MAX_PAGE}, got {limit}")
    return limit, _count(request, "offset", 0)


def wants_accessible(request: Request) -> bool:
    """``access_scope`` of a listing: everything that the caller may read, rather than only what is theirs."""
    scope = request.query_params.get("access_scope", _OWNED)
    if scope not in (_OWNED, _ACCESSIBLE):
        raise InvalidRequestError(f"access_scope must be {_OWNED!r} or {_ACCESSIBLE!r}, got {scope[:40]!r}")
    return scope == _ACCESSIBLE


def _count(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) > _MAX_COUNT:
        raise InvalidRequestError(f"{name} must be a whole number from 0 to {_MAX_COUNT}, got {text[:40]!r}")
    return int(text)
