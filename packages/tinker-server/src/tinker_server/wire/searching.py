"""Searching sessions: what clients send."""

from __future__ import annotations

from datetime import datetime

import attrs

from tinker_core.errors import InvalidRequestError
from tinker_core.types import SessionSearch, StatusQuery
from tinker_server.wire.body import Body
from tinker_server.wire.fields import Fields, as_object, show
from tinker_server.wire.sessions import FINISH_REASONS

_STATUSES = ("active", "cancelled", "failed", "client_finished")
_OWNERS = ("own", "accessible", "user")
_LARGEST_PAGE = 200
_MOST_OWNERS = 10
_LONGEST_TIME = 64


@attrs.frozen(kw_only=True)
class SearchRequest:
    """A search for sessions."""

    search: SessionSearch
    owner_urns: tuple[str, ...] | None
    """Whose sessions to search; None means the caller's own, which are all that they may see."""


def read_search(body: Body) -> SearchRequest:
    """A search for sessions; every field is optional."""
    fields = Fields(body.json_object(), "")
    metadata = fields.mapping("user_metadata", None) or {}
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    if len(texts) != len(metadata):
        raise InvalidRequestError("user_metadata must map texts to texts")
    limit = fields.integer("limit", 50)
    if not 1 <= limit <= _LARGEST_PAGE:
        raise InvalidRequestError(f"limit must be 1 to {_LARGEST_PAGE}, got {limit}")
    display_name = fields.text("display_name", None)
    if display_name == "":
        raise InvalidRequestError("display_name must not be empty; leave it out to match every name")
    request = SearchRequest(
        search=SessionSearch(
            session_id=fields.text("session_id", None),
            project_ids=fields.texts("project_ids") if fields.has("project_ids") else None,
            user_metadata=texts,
            display_name=display_name,
            statuses=_read_statuses(fields),
            limit=limit,
            after=_read_cursor(fields),
        ),
        owner_urns=_read_owner(fields),
    )
    fields.log_unknown()
    return request


def _read_statuses(fields: Fields) -> tuple[StatusQuery, ...] | None:
    items = fields.objects("statuses", None)
    if items is None:
        return None
    if not items:
        raise InvalidRequestError("statuses must not be empty; leave it out to match every status")
    queries = []
    for index, item in enumerate(items):
        where = f"statuses[{index}]"
        query = as_object(item, where)
        status = query.text("type")
        if status not in _STATUSES:
            raise InvalidRequestError(f"{where}.type must be one of {', '.join(_STATUSES)}, got {show(status)}")
        reasons = query.texts("reasons") if query.has("reasons") else None
        if reasons is not None and (not reasons or not set(reasons) <= set(FINISH_REASONS)):
            raise InvalidRequestError(f"{where}.reasons must be some of {', '.join(FINISH_REASONS)}")
        queries.append(StatusQuery(status=status, reasons=reasons))
    return tuple(queries)


def _read_cursor(fields: Fields) -> tuple[datetime, str] | None:
    if not fields.has("cursor"):
        return None
    cursor = fields.nested("cursor")
    text = cursor.text("last_created_at")
    try:
        moment = datetime.fromisoformat(text) if len(text) <= _LONGEST_TIME else None
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise InvalidRequestError(
            "cursor.last_created_at must be a time with its zone; send a response's next_cursor back unchanged"
        )
    return moment, cursor.text("last_session_id")


def _read_owner(fields: Fields) -> tuple[str, ...] | None:
    owner = fields.nested("owner")
    kind = owner.text("type", _OWNERS[0])
    if kind not in _OWNERS:
        raise InvalidRequestError(f"owner.type must be one of {', '.join(_OWNERS)}, got {show(kind)}")
    if kind != "user":
        return None
    urns = owner.texts("owner_urns")
    if not 1 <= len(urns) <= _MOST_OWNERS:
        raise InvalidRequestError(f"owner.owner_urns must name 1 to {_MOST_OWNERS} owners, got {len(urns)}")
    return urns
