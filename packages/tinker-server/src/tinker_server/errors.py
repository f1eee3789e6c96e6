"""Errors as HTTP answers: a status that clients treat as final unless waiting can help, and ``{"detail": ...}``.

402, 409, 425 and 429 never appear: clients pause or retry on them for minutes.
"""

from __future__ import annotations

import logging

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tinker_core.errors import TinkerError, WorkerLostError
from tinker_server.wire.body import JSON, BodyTooLargeError

_LOGGER = logging.getLogger(__name__)


def status_of(error: TinkerError) -> int:
    """The status that an error is answered with."""
    if isinstance(error, BodyTooLargeError):
        return 413
    if error.category == "user":
        return 404 if isinstance(error, LookupError) else 400
    return 503 if isinstance(error, WorkerLostError) else 500


def detail(message: str, status: int) -> Response:
    """An error body; its length is always stated and never zero."""
    return Response(orjson.dumps({"detail": message}), status_code=status, media_type=JSON)


async def answer_tinker_error(request: Request, error: Exception) -> Response:
    """A deliberate error."""
    if not isinstance(error, TinkerError):
        raise TypeError(f"not a TinkerError: {error!r}")
    status = status_of(error)
    if status >= 500:
        _LOGGER.error("%s %s failed: %s", request.method, request.url.path, error)
    return detail(str(error), status)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """An error of the HTTP layer itself, such as a path that does not exist."""
    if not isinstance(error, HTTPException):
        raise TypeError(f"not an HTTPException: {error!r}")
    return detail(f"{request.method} {request.url.path}: {error.detail}", error.status_code)


async def answer_unexpected(request: Request, error: Exception) -> Response:
    """A defect: the client learns its kind, the log (written by the framework, which re-raises) the rest."""
    return detail(f"{request.method} {request.url.path} failed inside the server: {type(error).__name__}", 500)
