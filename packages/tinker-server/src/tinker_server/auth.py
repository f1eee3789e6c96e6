"""Who a request comes from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from tinker_core.types import LOCAL_CALLER, Caller

Authenticate = Callable[[Mapping[str, str]], Awaitable[Caller]]
"""Async: request headers, by lower-case name -> the caller, to whom everything belongs that the request makes."""

_CALLER = "tinker.caller"


async def local_caller(headers: Mapping[str, str]) -> Caller:
    """A server without keys of its own: whatever ``X-API-Key`` holds, its sender is the one local caller."""
    del headers
    return LOCAL_CALLER


class AuthenticationMiddleware:
    """Finds out once per request who sent it, before any route sees it."""

    def __init__(self, app: ASGIApp, authenticate: Authenticate) -> None:
        self._app = app
        self._authenticate = authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its caller."""
        if scope["type"] == "http":
            scope[_CALLER] = await self._authenticate(Request(scope).headers)
        await self._app(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """The sender of a request that went through the middleware."""
    caller: Caller = request.scope[_CALLER]
    return caller
