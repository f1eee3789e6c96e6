"""The ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_core.engine import Engine
from tinker_core.errors import PluginError, TinkerError
from tinker_core.plugins import Plugins
from tinker_server.auth import Authenticate, AuthenticationMiddleware, local_caller
from tinker_server.errors import answer_http_exception, answer_tinker_error, answer_unexpected, detail
from tinker_server.plugin_list import list_plugins
from tinker_server.routes.bootstrap import BootstrapRoutes
from tinker_server.routes.futures import FutureRoutes
from tinker_server.routes.runs import RunRoutes
from tinker_server.routes.sampling import SamplingRoutes
from tinker_server.routes.training import TrainingRoutes
from tinker_server.routes.weights import WeightsRoutes
from tinker_server.services import PollGate, Services, answer

DEFAULT_BODY_LIMIT = 256 * 1024 * 1024
"""Bytes of a request body, before and after decompression."""

API_PREFIX = "/api/v1"
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def create_app(
    engine: Engine,
    *,
    plugins: Plugins,
    authenticate: Authenticate = local_caller,
    poll_seconds: float = 25.0,
    body_limit: int = DEFAULT_BODY_LIMIT,
) -> Starlette:
    """An app around an engine, which it starts and stops with its own lifespan.

    ``poll_seconds`` bounds one long poll: clients give up reading at 45. ``app.state.gate`` is the `PollGate` to close
    before the server drains its connections. Raises `PluginError` for a plugin route inside the API's own paths.
    """
    services = Services(
        engine=engine,
        poll_seconds=poll_seconds,
        body_limit=body_limit,
        gate=PollGate(),
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with engine:
            yield
            services.gate.close()

    async def plugin_list(_: Request) -> Response:
        return answer(list_plugins(plugins))

    app = Starlette(
        routes=[
            *BootstrapRoutes(services).routes(),
            *TrainingRoutes(services).routes(),
            *FutureRoutes(services).routes(),
            *SamplingRoutes(services).routes(),
            *WeightsRoutes(services).routes(),
            *RunRoutes(services).routes(),
            Route("/plugins", plugin_list, methods=["GET"]),
            Route(API_PREFIX + "/{path:path}", _not_implemented, methods=_METHODS),
            *_plugin_routes(plugins),
        ],
        exception_handlers={
            TinkerError: answer_tinker_error,
            HTTPException: answer_http_exception,
            Exception: answer_unexpected,
        },
        lifespan=lifespan,
        middleware=[Middleware(AuthenticationMiddleware, authenticate=authenticate)],
    )
    app.state.gate = services.gate
    return app


async def _not_implemented(request: Request) -> Response:
    return detail(f"{request.method} {request.url.path} is not implemented by this server yet", 404)


def _plugin_routes(plugins: Plugins) -> list[BaseRoute]:
    routes = plugins.routes()
    for route in routes:
        path = getattr(route, "path", None)
        if not isinstance(route, BaseRoute) or not isinstance(path, str):
            raise PluginError(f"a plugin registered {route!r} as a route; register Starlette Route or Mount objects")
        if f"{path}/".startswith(f"{API_PREFIX}/") or path == "":
            raise PluginError(f"a plugin registered the route {path!r}; plugin routes must lie outside {API_PREFIX}")
    return routes
