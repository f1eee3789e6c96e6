"""Handing decoded requests to the engine, whole ones and rejected ones alike."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from tinker_core.logs import note_in_log
from tinker_core.types import AcceptedRequest, Caller, EngineRequest
from tinker_server.services import Services, answer
from tinker_server.wire.body import Body
from tinker_server.wire.rejected import RejectedRequest
from tinker_server.wire.results import receipt


async def submit(
    services: Services,
    request: Request,
    reader: Callable[[Body], EngineRequest | RejectedRequest],
    *,
    carries_data: bool = False,
) -> Response:
    """Decode a request whose answer is a future, have it accepted, and answer with its receipt."""
    caller = services.caller(request)
    accepted = await accept(services, await services.read(request, reader, carries_data=carries_data), caller)
    return answer(receipt(accepted))


async def accept(services: Services, decoded: EngineRequest | RejectedRequest, caller: Caller) -> AcceptedRequest:
    """Have a request accepted; a rejected one keeps its place and fails in its future."""
    if isinstance(decoded, RejectedRequest):
        accepted = await services.engine.submit_failed(
            decoded.model_id, decoded.seq_id, decoded.request_type, decoded.error, caller
        )
    else:
        accepted = await services.engine.submit(decoded, caller)
    note_in_log(request_id=accepted.request_id, model_id=accepted.model_id)
    return accepted
