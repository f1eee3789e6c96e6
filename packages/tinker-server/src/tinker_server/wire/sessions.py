"""create_session and its companions: what clients send."""

from __future__ import annotations

import attrs

from tinker_core.errors import InvalidRequestError
from tinker_core.types import JsonObject
from tinker_server.wire.body import Body
from tinker_server.wire.fields import Fields

_FINISH_REASONS = ("success", "errored", "interrupted")


@attrs.frozen(kw_only=True)
class SessionRequest:
    """A session to create."""

    tags: tuple[str, ...]
    user_metadata: JsonObject | None
    sdk_version: str
    project_id: str | None
    display_name: str | None


@attrs.frozen(kw_only=True)
class FinishRequest:
    """How a client says that its session ended."""

    reason: str
    detail: str | None


def read_create_session(body: Body) -> SessionRequest:
    """A session to create; every field is optional."""
    fields = Fields(body.json_object(), "")
    tags = fields.objects("tags", [])
    texts = tuple(tag for tag in tags if isinstance(tag, str))
    if len(texts) != len(tags):
        raise InvalidRequestError("tags must be a list of texts")
    request = SessionRequest(
        tags=texts,
        user_metadata=fields.mapping("user_metadata", None),
        sdk_version=fields.text("sdk_version", ""),
        project_id=fields.text("project_id", None),
        display_name=fields.text("display_name", None),
    )
    fields.log_unknown()
    return request


def read_finish(body: Body) -> FinishRequest:
    """The end of a session; a body without a reason means success."""
    fields = Fields(body.json_object(), "")
    reason = fields.nested("reason").text("type", _FINISH_REASONS[0])
    if reason not in _FINISH_REASONS:
        raise InvalidRequestError(f"reason.type must be one of {', '.join(_FINISH_REASONS)}, got {reason!r}")
    return FinishRequest(reason=reason, detail=fields.text("detail", None))


def read_text(body: Body, key: str) -> str:
    """One required text of a small request, for example ``session_id``."""
    return Fields(body.json_object(), "").text(key)


def read_ttl(body: Body) -> int | None:
    """``ttl_seconds`` of a checkpoint; null, which must be said, lifts the limit."""
    fields = Fields(body.json_object(), "")
    if not fields.contains("ttl_seconds"):
        raise InvalidRequestError("ttl_seconds is required; send seconds, or null to keep the checkpoint for ever")
    return fields.integer("ttl_seconds", None)
