"""A server in front of the server, with other answers of ``client/config``: what a client does with its flags on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.serving import serve_in_thread

OVERRIDDEN = ("/api/v1/client/config", "/api/v1/client/dynamic_config")
NOT_PASSED_ON = ("host", "content-length", "transfer-encoding", "connection")


@contextlib.contextmanager
def override_client_config(url: str, flags: Mapping[str, object]) -> Iterator[str]:
    """Pass everything on to ``url``, and add ``flags`` to the answers that hold flags; yields the base URL."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as app.state.upstream:
            yield

    async def pass_on(request: Request) -> Response:
        headers = [(name, value) for name, value in request.headers.items() if name not in NOT_PASSED_ON]
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        upstream = request.app.state.upstream.build_request(
            request.method, target, headers=headers, content=await request.body()
        )
        answer = await request.app.state.upstream.send(upstream)
        if request.url.path in OVERRIDDEN:
            return Response(httpx.Response(200, json={**answer.json(), **flags}).content, media_type="application/json")
        passed = {
            name: value
            for name, value in answer.headers.items()
            if name not in (*NOT_PASSED_ON, "content-encoding", "date", "server")
        }
        return Response(answer.content, status_code=answer.status_code, headers=passed)

    methods = ["GET", "POST", "PUT", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", pass_on, methods=methods)], lifespan=lifespan)
    with serve_in_thread(app) as proxy:
        yield proxy
