"""Bytes to typed requests and typed results to bytes. Nothing outside this package knows what the wire looks like.

What a body is follows from its content type, what an answer is from ``Accept``, and what a client meant from the keys
that are present; the client's version is never looked at.
"""

from __future__ import annotations
