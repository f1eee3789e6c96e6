"""What the log knows of an HTTP request: a context for all lines that are written on the way, and a line at its end."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Receive, Scope, Send

from tinker_core.logs import log_context
from tinker_server.status_watch import StatusWatch
from tinker_server.wire.rejected import shorten

_LOGGER = logging.getLogger(__name__)


class AccessLogMiddleware:
    """Gives every request a log context, and writes a line for it if wanted. Outermost, so that refusals count too.

    Queries are left out: those of signed links open what they point to.
    """

    def __init__(self, app: ASGIApp, enabled: bool) -> None:
        self._app = app
        self._enabled = enabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with log_context(method=scope["method"], path=shorten(scope["path"])):
            if not self._enabled:
                await self._app(scope, receive, send)
                return
            await self._logged(scope, receive, send)

    async def _logged(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = StatusWatch(send)
        started = time.monotonic()
        try:
            await self._app(scope, receive, watch)
        finally:
            host, port = scope.get("client") or ("unknown", 0)
            seconds = round(time.monotonic() - started, 6)
            extra = {"client": f"{host}:{port}", "status": watch.status, "seconds": seconds}
            request = f"{scope['method']} {shorten(scope['path'])}"
            _LOGGER.info("%s:%d %r %d", host, port, request, watch.status, extra=extra)
