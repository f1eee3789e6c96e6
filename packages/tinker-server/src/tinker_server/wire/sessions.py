"""create_session and its companions: what clients send."""

from __future__ import annotations

import attrs

from tinker_core.engine.copies import check_project_id
from tinker_core.errors import InvalidRequestError
from tinker_core.types import JsonObject
from tinker_server.wire.body import Body
from tinker_server.wire.fields import Fields, show
from tinker_server.wire.rejected import shorten

FINISH_REASONS = ("success", "errored", "interrupted")
"""How clients say that their sessions ended."""


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


def read_client_config(body: Body) -> str:
    """The SDK's version; empty when it does not say."""
    fields = Fields(body.json_object(), "")
    sdk_version = fields.text("sdk_version", "")
    fields.log_unknown()
    return sdk_version


def read_create_session(body: Body) -> SessionRequest:
    """A session to create; every field is optional."""
    fields = Fields(body.json_object(), "")
    tags = fields.objects("tags", [])
    texts = tuple(tag for tag in tags if isinstance(tag, str))
    if len(texts) != len(tags):
        raise InvalidRequestError("tags must be a list of texts")
    project_id = fields.text("project_id", None)
    if project_id:
        check_project_id(project_id)
    request = SessionRequest(
        tags=texts,
        user_metadata=fields.metadata("user_metadata"),
        sdk_version=fields.text("sdk_version", ""),
        project_id=project_id,
        display_name=fields.text("display_name", None),
    )
    fields.log_unknown()
    return request


def read_finish(body: Body) -> FinishRequest:
    """The end of a session; a body without a reason means success."""
    fields = Fields(body.json_object(), "")
    given = fields.nested("reason")
    reason = given.text("type", FINISH_REASONS[0])
    if reason not in FINISH_REASONS:
        raise InvalidRequestError(f"reason.type must be one of {', '.join(FINISH_REASONS)}, got {reason!r}")
    told = fields.raw("detail")
    given.log_unknown()
    fields.log_unknown()
    if told is not None and not isinstance(told, str):
        raise InvalidRequestError(f"detail must be a string or null, got {show(told)}")
    # A long traceback, or one with characters that cannot be kept, is no reason to fail the end of a client's work.
    return FinishRequest(reason=reason, detail=None if told is None else shorten(told).replace("\0", "\ufffd"))


def read_text(body: Body, key: str) -> str:
    """One required text of a small request, for example ``session_id``."""
    fields = Fields(body.json_object(), "")
    text = fields.text(key)
    fields.log_unknown()
    return text


def read_ttl(body: Body) -> int | None:
    """``ttl_seconds`` of a checkpoint; null, which must be said, lifts the limit."""
    fields = Fields(body.json_object(), "")
    if not fields.contains("ttl_seconds"):
        raise InvalidRequestError("ttl_seconds is required; send seconds, or null to keep the checkpoint for ever")
    ttl_seconds = fields.integer("ttl_seconds", None)
    fields.log_unknown()
    return ttl_seconds
