"""Requests that can be placed but not understood."""

from __future__ import annotations

import attrs

from tinker_core.errors import TinkerError
from tinker_core.types import RequestError, RequestType


@attrs.frozen(kw_only=True)
class RejectedRequest:
    """A request whose place in its queue is known and whose content is wrong.

    It must be accepted and its future failed: a refused submission leaves the client with a hole in its sequence.
    """

    model_id: str
    """The model; for samples, the sampling session."""
    seq_id: int
    """The place; 0 for requests that create a model."""
    request_type: RequestType
    error: RequestError


MAX_MESSAGE = 2000
"""Most characters of an error message that quotes what a client sent."""


def shorten(text: str) -> str:
    """The text, or its beginning: a message may quote a name of any length, and would be kept with its future."""
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}… ({len(text)} characters)"


def reject(model_id: str, seq_id: int, request_type: RequestType, error: TinkerError) -> RejectedRequest:
    """A request that takes its place and reports an error there."""
    reported = RequestError(category=error.category, code=type(error).__name__, message=shorten(str(error)))
    return RejectedRequest(model_id=model_id, seq_id=seq_id, request_type=request_type, error=reported)
