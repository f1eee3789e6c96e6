"""How the life of this server process has gone so far."""

from __future__ import annotations

import time


class ServerLife:
    """Notes when the process accepted requests and when its models were ready."""

    def __init__(self, *, restarts: int = 0, since: float | None = None) -> None:
        self.restarts = restarts
        """Server processes that ended before it."""
        self._since = time.monotonic() if since is None else since
        self.accepting_seconds = 0.0
        """From the end of the last process, or the start of the first, until requests were accepted; 0 before."""
        self.ready_seconds = 0.0
        """Until all models were ready."""

    def note_accepting(self) -> None:
        """Requests are accepted from now on."""
        self.accepting_seconds = time.monotonic() - self._since

    def note_ready(self) -> None:
        """All models are ready."""
        self.ready_seconds = time.monotonic() - self._since
