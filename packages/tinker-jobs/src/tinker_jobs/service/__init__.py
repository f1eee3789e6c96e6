"""The server's side: the queue, the processes, and the HTTP API."""

from __future__ import annotations
