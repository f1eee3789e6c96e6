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
from tinker_server.wire.body import JSON, Body, BodyTooLargeError

_T = TypeVar("_T")

MAX_PAGE = 1000
"""Most items of one page of a listing."""


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
    body_limit: int
    gate: PollGate

    def caller(self, request: Request) -> Caller:
        """Who sent it, with which key."""
        return caller_of(request)

    def owner(self, request: Request) -> str:
        """Whose request it is."""
        return caller_of(request).owner

    async def read(self, request: Request, reader: Callable[[Body], _T]) -> _T:
        """Receive the body and decode it; large ones are decoded off the event loop."""
        body = Body(
            data=await _receive(request, self.body_limit),
            content_type=request.headers.get("content-type", JSON),
            content_encoding=request.headers.get("content-encoding", ""),
            limit=self.body_limit,
        )
        if body.is_large:
            return await asyncio.to_thread(reader, body)
        return reader(body)


async def _receive(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLargeError(limit)
    parts: list[bytes] = []
    total = 0
    async for part in request.stream():
        total += len(part)
        if total > limit:
            raise BodyTooLargeError(limit)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def answer(value: object, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(value), status_code=status, media_type=JSON)


def page_of(request: Request, default_limit: int) -> tuple[int, int]:
    """``limit`` and ``offset`` of a listing."""
    limit = _count(request, "limit", default_limit)
    if limit > MAX_PAGE:
        raise InvalidRequestError(f"limit must be at most {MAX_PAGE}, got {limit}")
    return limit, _count(request, "offset", 0)


def _count(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isdecimal():
        raise InvalidRequestError(f"{name} must be a whole number of at least 0, got {text!r}")
    return int(text)
