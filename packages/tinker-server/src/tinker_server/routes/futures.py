"""Fetching results, and giving them up."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_core.errors import UnseenClientError
from tinker_core.logs import note_in_log
from tinker_core.types import RequestError
from tinker_server.errors import detail
from tinker_server.services import Services, answer
from tinker_server.wire.futures import (
    METADATA_BYTES,
    announcement_to_json,
    completions_to_json,
    pending_to_json,
    read_cancel_future,
    read_retrieve_future,
    read_retrieve_futures,
)
from tinker_server.wire.rejected import shorten
from tinker_server.wire.results import LARGE_BYTES, encode, payload_bytes


class FutureRoutes:
    """retrieve_future, retrieve_futures and cancel_future."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [
            Route("/api/v1/retrieve_future", self.retrieve_future, methods=["POST"]),
            Route("/api/v1/retrieve_futures", self.retrieve_futures, methods=["POST"]),
            Route("/api/v1/cancel_future", self.cancel_future, methods=["POST"]),
        ]

    async def retrieve_future(self, request: Request) -> Response:
        """A long poll: the result as soon as it is there, else 408, on which clients silently ask again."""
        services = self._services
        owner = services.owner(request)
        wanted = await services.read(request, read_retrieve_future)
        note_in_log(request_id=shorten(wanted.request_id))
        patience = services.poll_patience()
        output = await services.gate.wait(self._engine.retrieve(wanted.request_id, patience, owner))
        if output is None:
            status = await self._engine.polls.queue_status(wanted.request_id, owner)
            pending = answer(pending_to_json(wanted.request_id, status), 408)
            if patience < services.poll_seconds:
                pending.headers["connection"] = "close"
            return pending
        if isinstance(output, RequestError) and output.code == UnseenClientError.__name__:
            return detail(output.message, 410)  # to clients, a request to be sent again
        size = payload_bytes(output)
        if wanted.allow_metadata_only and size >= METADATA_BYTES:
            return answer(announcement_to_json(size))
        accept = request.headers.get("accept", "")
        result = await asyncio.to_thread(encode, output, accept) if size > LARGE_BYTES else encode(output, accept)
        return Response(result.content, media_type=result.media_type)

    async def retrieve_futures(self, request: Request) -> Response:
        """A long poll for all samples of one sampling client; it then fetches each result by itself."""
        services = self._services
        owner = services.owner(request)
        wanted = await services.read(request, read_retrieve_futures)
        longest = services.poll_patience()
        poll = self._engine.polls.completions(
            wanted.target,
            owner,
            cursor=wanted.cursor,
            timeout=longest if wanted.timeout is None else min(wanted.timeout, longest),
            retrieved=wanted.retrieved,
        )
        page = await services.gate.wait(poll)
        if page is None:
            return detail("the server is stopping", 503)
        return answer(completions_to_json(page))

    async def cancel_future(self, request: Request) -> Response:
        """Stop a sample; its future fails. One that has its result keeps it."""
        request_id = await self._services.read(request, read_cancel_future)
        await self._engine.polls.cancel(request_id, self._services.owner(request))
        return answer({})
