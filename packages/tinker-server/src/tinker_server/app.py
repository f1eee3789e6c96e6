"""The ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_core.engine import Engine
from tinker_core.errors import PluginError, TinkerError
from tinker_core.plugins import Plugins
from tinker_server.access_log import AccessLogMiddleware
from tinker_server.auth import Authentication, AuthenticationMiddleware
from tinker_server.client_flags import DEFAULT_FLAGS, ClientFlags
from tinker_server.errors import (
    answer_disconnect,
    answer_http_exception,
    answer_tinker_error,
    answer_unexpected,
    detail,
    path_of,
)
from tinker_server.extensions import Extensions
from tinker_server.life import ServerLife
from tinker_server.limits import DEFAULT_LIMITS, Limits
from tinker_server.metrics import Metrics, MetricsMiddleware, templates_of
from tinker_server.plugin_list import list_plugins
from tinker_server.prices import NO_PRICES, Prices
from tinker_server.routes.agreement import AgreementRoutes
from tinker_server.routes.billing import BillingRoutes
from tinker_server.routes.bootstrap import BootstrapRoutes
from tinker_server.routes.checkpoints import CheckpointRoutes
from tinker_server.routes.credentials import CredentialRoutes
from tinker_server.routes.files import FileRoutes
from tinker_server.routes.futures import FutureRoutes
from tinker_server.routes.runs import RunRoutes
from tinker_server.routes.sampling import SamplingRoutes
from tinker_server.routes.sessions import SessionRoutes
from tinker_server.routes.training import TrainingRoutes
from tinker_server.routes.weights import WeightsRoutes
from tinker_server.services import PollGate, Services, answer
from tinker_server.signing import PURPOSE, Signer
from tinker_server.tokens import Tokens

API_PREFIX = "/api/v1"
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def create_app(
    engine: Engine,
    *,
    plugins: Plugins,
    poll_seconds: float = 25.0,
    limits: Limits = DEFAULT_LIMITS,
    public_url: str | None = None,
    prices: Prices = NO_PRICES,
    jwt_auth: bool = False,
    flags: ClientFlags = DEFAULT_FLAGS,
    access_log: bool = False,
    life: ServerLife | None = None,
    runs_engine: bool = True,
    own_url: str | None = None,
) -> Starlette:
    """An app around an engine, which it starts and stops with its own lifespan unless ``runs_engine`` is false.

    ``poll_seconds`` bounds one long poll: clients give up reading at 45. ``public_url`` is where clients reach the
    server, when it is not where their requests seem to go; links for downloads begin with it. ``app.state.gate`` is
    the `PollGate` to close before the server drains its connections. Raises `PluginError` for a plugin route inside
    the API's own paths.
    """
    services = Services(
        engine=engine,
        poll_seconds=poll_seconds,
        limits=limits,
        gate=PollGate(),
        signer=Signer(lambda: engine.signing_key(PURPOSE)),
        public_url=public_url,
        tokens=Tokens(lambda: engine.signing_key("jwt")),
        prices=prices,
        jwt_auth=jwt_auth,
        flags=flags,
    )
    extensions = Extensions(plugins, services, own_url)
    metrics = Metrics(engine, services.gate, life or ServerLife())
    templates: dict[object, str] = {}

    app = Starlette(
        routes=[
            *_api_routes(services, extensions),
            metrics.route(),
            _plugins_route(plugins),
            *_plugin_routes(plugins),
        ],
        exception_handlers=_ERROR_ANSWERS,
        lifespan=_lifespan(engine if runs_engine else None, metrics, extensions, services.gate),
        middleware=[
            Middleware(AccessLogMiddleware, enabled=access_log),
            Middleware(MetricsMiddleware, metrics=metrics, templates=templates),
            Middleware(AuthenticationMiddleware, authenticate=Authentication(engine, services.tokens), engine=engine),
        ],
    )
    templates.update(templates_of(app.routes))
    app.router.redirect_slashes = False  # a redirect would repeat whatever Host the request names
    app.state.gate = services.gate
    return app


def _lifespan(
    engine: Engine | None, metrics: Metrics, extensions: Extensions, gate: PollGate
) -> Callable[[Starlette], contextlib.AbstractAsyncContextManager[None]]:
    """What begins and ends with the app: the engine if there is one to run, watching it, and services of plugins."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if engine is not None:
                await stack.enter_async_context(engine)
            await stack.enter_async_context(metrics.observing())
            await stack.enter_async_context(extensions.running())
            yield
            gate.close()

    return lifespan


_ERROR_ANSWERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    TinkerError: answer_tinker_error,
    HTTPException: answer_http_exception,
    ClientDisconnect: answer_disconnect,
    Exception: answer_unexpected,
}


def _plugins_route(plugins: Plugins) -> Route:
    async def plugin_list(_: Request) -> Response:
        return answer(list_plugins(plugins))

    return Route("/plugins", plugin_list, methods=["GET"])


def _api_routes(services: Services, extensions: Extensions) -> list[BaseRoute]:
    """The API's own routes, then those of services, which can so shadow none of them."""
    nouns = (
        FutureRoutes(services),  # routes are tried in turn, so those that are asked for most come first
        TrainingRoutes(services),
        SamplingRoutes(services),
        BootstrapRoutes(services),
        WeightsRoutes(services),
        FileRoutes(services),
        CheckpointRoutes(services),
        RunRoutes(services),
        SessionRoutes(services),
        CredentialRoutes(services),
        BillingRoutes(services),
        AgreementRoutes(services),
    )
    rest = Route(API_PREFIX + "/{path:path}", _not_implemented, methods=_METHODS)
    return [*(route for noun in nouns for route in noun.routes()), *extensions.routes(), rest]


async def _not_implemented(request: Request) -> Response:
    return detail(f"{request.method} {path_of(request)} is not implemented by this server yet", 404)


def _plugin_routes(plugins: Plugins) -> list[BaseRoute]:
    routes = plugins.routes()
    for route in routes:
        path = getattr(route, "path", None)
        if not isinstance(route, BaseRoute) or not isinstance(path, str):
            raise PluginError(f"a plugin registered {route!r} as a route; register Starlette Route or Mount objects")
        if f"{path}/".startswith(f"{API_PREFIX}/") or path == "":
            raise PluginError(f"a plugin registered the route {path!r}; plugin routes must lie outside {API_PREFIX}")
    return routes
