"""Handing decoded requests to the engine, whole ones and rejected ones alike."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from tinker_core.types import AcceptedRequest, EngineRequest
from tinker_server.services import Services, answer
from tinker_server.wire.body import Body
from tinker_server.wire.rejected import RejectedRequest
from tinker_server.wire.results import receipt


async def submit(
    services: Services, request: Request, reader: Callable[[Body], EngineRequest | RejectedRequest]
) -> Response:
    """Decode a request whose answer is a future, have it accepted, and answer with its receipt."""
    owner = services.owner(request)
    accepted = await accept(services, await services.read(request, reader), owner)
    return answer(receipt(accepted))


async def accept(services: Services, decoded: EngineRequest | RejectedRequest, owner: str) -> AcceptedRequest:
    """Have a request accepted; a rejected one keeps its place and fails in its future."""
    if isinstance(decoded, RejectedRequest):
        return await services.engine.submit_failed(
            decoded.model_id, decoded.seq_id, decoded.request_type, decoded.error, owner
        )
    return await services.engine.submit(decoded, owner)
