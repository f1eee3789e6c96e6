"""Short-lived tokens that stand for an API key: JWTs signed with a key of this server."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import attrs

from tinker_core.errors import AuthenticationError
from tinker_core.types import Caller

LIFETIME_SECONDS = 3600.0
"""Clients exchange their key again at half of it."""

_ALGORITHM = "HS256"
_ISSUER = "tinker-server"
_KEY_ID = "key_id"


def looks_like_token(credential: str) -> bool:
    """Whether a credential is a JWT rather than an API key, which begins with ``tml-``."""
    return credential.startswith("eyJ")


def urn_of(owner: str) -> str:
    """The name by which clients know an owner besides the plain one."""
    return f"tml:organization_user:{owner}"


@attrs.frozen(kw_only=True)
class TokenClaims:
    """What a valid token says."""

    key_id: str
    """The API key that it stands for."""
    expires_at: float
    """POSIX time."""


class Tokens:
    """Issues tokens and checks them. What a token's key may do, or whether it still exists, is not looked at here."""

    def __init__(self, signing_key: Callable[[], bytes]) -> None:
        self._signing_key = signing_key

    def issue(self, caller: Caller, now: datetime, *, not_after: float | None = None) -> str:
        """A token for a caller, with the claims that clients read; ``not_after`` bounds its life (POSIX time)."""
        import jwt  # slow to load, and most servers never need it

        issued_at = now.timestamp()
        expires_at = issued_at + LIFETIME_SECONDS
        claims = {
            "iss": _ISSUER,
            "iat": issued_at,
            "exp": expires_at if not_after is None else min(expires_at, not_after),
            "sub": urn_of(caller.owner),
            "org_id": caller.owner,
            "email": email_of(caller.owner),
            _KEY_ID: caller.key_id,
        }
        return jwt.encode(claims, self._signing_key(), algorithm=_ALGORITHM)

    def read(self, token: str, now: datetime) -> TokenClaims:
        """What a token says; raises `AuthenticationError` if it is forged, damaged or expired, or names no key."""
        import jwt

        try:
            # PyJWT would compare with the machine's clock, not with the server's.
            claims = jwt.decode(
                token,
                self._signing_key(),
                algorithms=[_ALGORITHM],
                issuer=_ISSUER,
                options={"verify_exp": False, "verify_iat": False, "require": ["exp", "iat", "iss"]},
            )
        except jwt.InvalidTokenError as error:
            raise AuthenticationError(f"this token is not valid: {error}", invalid_token=True) from error
        key_id, expires_at = claims.get(_KEY_ID), claims["exp"]
        if not isinstance(expires_at, int | float) or expires_at <= now.timestamp():
            raise AuthenticationError("this token has expired; exchange the API key for a new one", invalid_token=True)
        if not isinstance(key_id, str):
            raise AuthenticationError("this token stands for no API key", invalid_token=True)
        return TokenClaims(key_id=key_id, expires_at=float(expires_at))


def email_of(owner: str) -> str:
    """An owner that is an e-mail address; empty for any other name, which clients show as none."""
    return owner if "@" in owner else ""
