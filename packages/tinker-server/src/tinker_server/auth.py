"""Who a request comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tinker_core.types import LOCAL_OWNER

Authenticate = Callable[[Mapping[str, str]], str]
"""Request headers, by lower-case name -> owner of everything the request makes and sees."""


def local_owner(headers: Mapping[str, str]) -> str:
    """A server without keys of its own: whatever ``X-API-Key`` holds, its sender is the one local owner."""
    del headers
    return LOCAL_OWNER
