"""The status of an HTTP request's answer, for those who count or log it."""

from __future__ import annotations

from starlette.types import Message, Send

_NO_ANSWER = 499
"""The status of a request whose connection ended without an answer."""


class StatusWatch:
    """Passes an answer on to where it goes, and remembers its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = _NO_ANSWER

    async def __call__(self, message: Message) -> None:
        """Pass a part of the answer on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
