"""Signed links: whoever has one may GET what it names until it expires, without a key."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import quote, urlencode

import attrs
from starlette.requests import Request

from tinker_core.errors import InvalidRequestError, UserError

PURPOSE = "signed links"
"""Which of the server's keys signs them."""
LINK_SECONDS = 3600
"""How long a link is good for. The CLI asks for new ones when five minutes are left."""

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252})?(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:[0-9]{1,5})?")
_EXPIRY = re.compile(r"[0-9]{1,12}")


class InvalidLinkError(UserError):
    """A link that this server did not sign, or whose time is over."""

    def __init__(self) -> None:
        super().__init__("this link is not valid, or no longer; ask the API for a new one")


@attrs.frozen(kw_only=True)
class Link:
    """A signed link."""

    url: str
    expires: datetime


class Signer:
    """Makes links and checks them. A signature covers the path, the version of what it names, and the expiry."""

    def __init__(self, key: Callable[[], bytes], clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._clock = clock

    def link(self, base_url: str, path: str, version: str = "") -> Link:
        """A link to a path of this server; ``version`` tells apart what has the same path one after the other."""
        expires = int(self._clock()) + LINK_SECONDS
        query = {"version": version, "expires": str(expires), "signature": self._sign(path, version, str(expires))}
        return Link(
            url=f"{base_url}{quote(path, safe='/:')}?{urlencode(query)}", expires=datetime.fromtimestamp(expires, UTC)
        )

    def check(self, request: Request) -> str:
        """The version that a request's link names; raises `InvalidLinkError`."""
        version, expires, signature = (request.query_params.get(key, "") for key in ("version", "expires", "signature"))
        wanted = self._sign(request.scope["path"], version, expires)
        genuine = hmac.compare_digest(wanted.encode(), signature.encode("utf-8", "surrogatepass"))
        if not genuine or not _EXPIRY.fullmatch(expires) or int(expires) <= self._clock():
            raise InvalidLinkError
        return version

    def _sign(self, path: str, version: str, expires: str) -> str:
        message = "\0".join((path, version, expires)).encode("utf-8", "surrogatepass")
        return hmac.new(self._key(), message, hashlib.sha256).hexdigest()


def base_url_of(request: Request, public_url: str | None) -> str:
    """Where clients reach this server: as configured, else as the request itself did.

    Raises `InvalidRequestError` for a ``Host`` that is none; links are made with it.
    """
    if public_url is not None:
        return public_url.rstrip("/")
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        raise InvalidRequestError(
            "the Host header names no host, so that no link can be made; send a valid one, or start the server with "
            "--public-url"
        )
    return f"{'https' if request.scope['scheme'] == 'https' else 'http'}://{host}"
