"""Errors as HTTP answers: a status that clients treat as final unless waiting can help, and ``{"detail": ...}``.

The Tinker API never answers 402, 409 or 425: clients pause or retry on them for minutes. Services of plugins have
clients of their own and may. 408 answers a body that did not arrive in
time: clients send it again. 429 answers what exceeds an API key's rate, and says how long to wait: clients do, and then
succeed. It never answers a training request, which would lose its place. 503 says that the same request will succeed
later: clients send it again, silently, for minutes, and keep the order of their requests meanwhile.
"""

from __future__ import annotations

import logging
import math

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tinker_core.errors import (
    AuthenticationError,
    DatabaseUnavailableError,
    JournalError,
    JournalFullError,
    RateLimitError,
    ResultGoneError,
    TinkerError,
    WorkerLostError,
)
from tinker_server.receiving import ServerBusyError, SlowBodyError
from tinker_server.signing import InvalidLinkError
from tinker_server.wire.body import JSON, BodyTooLargeError
from tinker_server.wire.rejected import shorten

_LOGGER = logging.getLogger(__name__)

FULL_RETRY_SECONDS = 5.0
"""After which a request is sent again that the journal had no room for: snapshots make room, and they take a while."""


def status_of(error: TinkerError) -> int:
    """The status that an error is answered with."""
    if isinstance(error, BodyTooLargeError):
        return 413
    if isinstance(error, InvalidLinkError):
        return 403
    if isinstance(error, SlowBodyError):
        return 408
    if isinstance(error, ServerBusyError):
        return 503
    if isinstance(error, ResultGoneError):
        return 410
    if isinstance(error, AuthenticationError):
        return 401
    if isinstance(error, RateLimitError):
        return 429
    if error.category == "user":
        return 404 if isinstance(error, LookupError) else 400
    return 503 if isinstance(error, _TEMPORARY) else 500


_TEMPORARY = (WorkerLostError, DatabaseUnavailableError, JournalFullError, JournalError)
"""What is over after a while, or after a restart."""


def detail(message: str, status: int) -> Response:
    """An error body; its length is always stated and never zero, and its text no longer than `MAX_MESSAGE`."""
    text = shorten(message).encode("utf-8", "backslashreplace").decode()
    return Response(orjson.dumps({"detail": text}), status_code=status, media_type=JSON)


def path_of(request: Request) -> str:
    """The path as the client wrote it. ``request.url`` would trust its Host header as well."""
    return str(request.scope["path"])


async def answer_tinker_error(request: Request, error: Exception) -> Response:
    """A deliberate error."""
    if not isinstance(error, TinkerError):
        raise TypeError(f"not a TinkerError: {error!r}")
    status = status_of(error)
    if status >= 500:
        _LOGGER.error("%s %r failed: %s", request.method, shorten(path_of(request)), error)
    return answer_of(error)


def answer_of(error: TinkerError) -> Response:
    """A deliberate error with the headers that say what may help."""
    answer = detail(str(error), status_of(error))
    if isinstance(error, AuthenticationError):
        # Clients that exchange their key for tokens do so again, once, when told of an invalid token.
        answer.headers["www-authenticate"] = "Bearer" + (' error="invalid_token"' if error.invalid_token else "")
    wait = error.retry_after if isinstance(error, RateLimitError) else None
    if isinstance(error, JournalFullError):
        wait = FULL_RETRY_SECONDS
    if wait is not None:
        answer.headers["retry-after"] = str(math.ceil(wait))
        answer.headers["retry-after-ms"] = str(math.ceil(wait * 1000))
    return answer


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """An error of the HTTP layer itself, such as a path that does not exist."""
    if not isinstance(error, HTTPException):
        raise TypeError(f"not an HTTPException: {error!r}")
    return detail(f"{request.method} {path_of(request)}: {error.detail}", error.status_code)


async def answer_disconnect(request: Request, error: Exception) -> Response:
    """A client that went away before its request was whole; nobody is left to read this."""
    del request, error
    return detail("the request body is not complete", 400)


async def answer_unexpected(request: Request, error: Exception) -> Response:
    """A defect: the client learns its kind, the log (written by the framework, which re-raises) the rest."""
    return detail(f"{request.method} {path_of(request)} failed inside the server: {type(error).__name__}", 500)
