"""Who a request comes from, and whether their key may send it now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from tinker_core.engine import Engine
from tinker_core.errors import AuthenticationError, RateLimitError, StorageError
from tinker_core.logs import note_in_log
from tinker_core.types import LOCAL_CALLER, Caller
from tinker_server.errors import answer_of
from tinker_server.tokens import Tokens, looks_like_token

Authenticate = Callable[[Mapping[str, str]], Awaitable[Caller]]
"""Async: request headers, by lower-case name -> the caller, to whom everything belongs that the request makes.

Raises `AuthenticationError` for whoever may not come in.
"""

_API = "/api/v1"

OPEN_PATHS = frozenset({"/healthz", "/readyz", f"{_API}/healthz", f"{_API}/readyz"})
"""What needs no key: they tell nothing about anybody's work."""

OPEN_PREFIXES: tuple[str, ...] = ("/download/",)
"""Paths that begin so need no key, because they carry a proof of their own."""

UNMETERED_PATHS = frozenset(
    {
        f"{_API}/{path}"
        for path in (
            "client/config",
            "client/dynamic_config",
            "auth/token",
            "telemetry",
            "session_heartbeat",
            "retrieve_future",
            "retrieve_futures",
            "cancel_future",
            # The engine meters what follows, for it must delay some of it and knows which are repeats.
            "create_model",
            "forward",
            "forward_backward",
            "optim_step",
            "save_weights",
            "save_weights_for_sampler",
            "save_weights_external",
            "load_weights",
            "unload_model",
            "create_custom_loss",
            "asample",
        )
    }
)
"""What a key's rate of requests leaves alone here. Every other path counts, those of plugins too."""

_UNMETERED_SUFFIX = "/finish"
"""The end of a session gives room back; it is never put off."""

_CALLER = "tinker.caller"


class Authentication:
    """Knows callers by API key or by a token issued for one; without any key ever made, by anything or nothing."""

    def __init__(self, engine: Engine, tokens: Tokens) -> None:
        self._engine = engine
        self._tokens = tokens

    async def __call__(self, headers: Mapping[str, str]) -> Caller:
        """The caller; raises `AuthenticationError`."""
        keys = self._engine.accounts.keys
        if not await keys.demands_keys():
            return LOCAL_CALLER
        credential = credential_of(headers)
        if credential is None:
            raise AuthenticationError("no API key; send one as X-API-Key (the SDK reads TINKER_API_KEY)")
        if looks_like_token(credential):
            return await keys.caller_with_key_id(self._tokens.read(credential, self._engine.now()).key_id)
        return await keys.caller_with_key(credential)


def credential_of(headers: Mapping[str, str]) -> str | None:
    """``X-API-Key``, or else an ``Authorization: Bearer``, which is what tools other than the SDK can send."""
    credential = headers.get("x-api-key", "").strip()
    if not credential:
        scheme, _, credential = headers.get("authorization", "").partition(" ")
        credential = credential.strip() if scheme.lower() == "bearer" else ""
    return credential or None


class AuthenticationMiddleware:
    """Finds out once per request who sent it, and whether it is within their rate, before any route sees it.

    Errors raised out here pass by the application's exception handlers, so refusals are answered here.
    """

    def __init__(self, app: ASGIApp, authenticate: Authenticate, engine: Engine) -> None:
        self._app = app
        self._authenticate = authenticate
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its caller, or answer why not."""
        if scope["type"] == "http" and not is_open(scope["path"]):
            try:
                caller = await self._authenticate(Request(scope).headers)
                if is_metered(scope["path"]):
                    self._engine.accounts.limiter.admit(caller)
            except (AuthenticationError, RateLimitError, StorageError) as error:
                await answer_of(error)(scope, receive, send)
                return
            scope[_CALLER] = caller
            note_in_log(owner=caller.owner)
        await self._app(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether a path is served without a key."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def is_metered(path: str) -> bool:
    """Whether requests for a path count towards their key's rate here."""
    return path not in UNMETERED_PATHS and not path.endswith(_UNMETERED_SUFFIX)


def caller_of(request: Request) -> Caller:
    """The sender of a request that went through the middleware; a `KeyError` on the paths that are open to all."""
    caller: Caller = request.scope[_CALLER]
    return caller
