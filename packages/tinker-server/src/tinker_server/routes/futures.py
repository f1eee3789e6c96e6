"""Fetching results."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_server.services import Services, answer
from tinker_server.wire.results import encode, is_large
from tinker_server.wire.sessions import read_text


class FutureRoutes:
    """retrieve_future."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [Route("/api/v1/retrieve_future", self.retrieve_future, methods=["POST"])]

    async def retrieve_future(self, request: Request) -> Response:
        """A long poll: the result as soon as it is there, else 408, on which clients silently ask again."""
        services = self._services
        request_id = await services.read(request, lambda body: read_text(body, "request_id"))
        poll = services.engine.retrieve(request_id, services.poll_seconds, services.owner(request))
        output = await services.gate.wait(poll)
        if output is None:
            return answer({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)
        accept = request.headers.get("accept", "")
        result = await asyncio.to_thread(encode, output, accept) if is_large(output) else encode(output, accept)
        return Response(result.content, media_type=result.media_type)
