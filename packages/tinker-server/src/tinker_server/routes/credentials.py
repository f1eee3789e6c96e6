"""API keys and tokens, as far as their holders deal with them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_core.errors import InvalidRequestError
from tinker_core.types import JsonObject
from tinker_server.auth import credential_of
from tinker_server.services import Services, answer
from tinker_server.tokens import email_of, looks_like_token


class CredentialRoutes:
    """The exchange of a key for a token, and what a key can learn of, and do to, itself."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [
            Route("/api/v1/auth/token", self.token, methods=["POST"]),
            Route("/api/v1/auth/apikey/me", self.me, methods=["GET"]),
            Route("/api/v1/auth/apikey/me", self.revoke_me, methods=["DELETE"]),
        ]

    async def token(self, request: Request) -> Response:
        """A short-lived token. One got for another token does not outlive it: only the key itself renews access."""
        caller, now = self._services.caller(request), self._engine.now()
        credential = credential_of(request.headers) or ""
        not_after = None
        if caller.key_id is not None and looks_like_token(credential):
            not_after = self._services.tokens.read(credential, now).expires_at
        return answer({"jwt": self._services.tokens.issue(caller, now, not_after=not_after)})

    async def me(self, request: Request) -> Response:
        """What is known of the key, as ``tinker auth login`` shows it."""
        caller = self._services.caller(request)
        if caller.key_id is None:
            return answer(_describe(0, caller.owner, "this server accepts any key", caller.owner))
        number, record = await self._engine.accounts.keys.record(caller.key_id)
        note = f"{record.key_id}, ends in {record.last_four}"
        return answer(_describe(number, record.name, note, record.owner))

    async def revoke_me(self, request: Request) -> Response:
        """Revoke the key that this request was sent with."""
        caller = self._services.caller(request)
        if caller.key_id is None:
            raise InvalidRequestError("this server accepts any key, so there is none to revoke")
        if looks_like_token(credential_of(request.headers) or ""):
            raise InvalidRequestError("a token cannot revoke its API key; send the key itself")
        await self._engine.accounts.keys.revoke(caller.key_id)
        return answer({})


def _describe(number: int, name: str, note: str, owner: str) -> JsonObject:
    """The CLI's ``SelfApiKeyResponse``."""
    return {
        "key_id": number,
        "name": name,
        "note": note,
        "details": {"org_details": {"name": owner}, "user_details": {"email": email_of(owner) or owner}},
    }
