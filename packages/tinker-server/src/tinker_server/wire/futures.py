"""retrieve_future, retrieve_futures and cancel_future: what clients send, and the answers that are not results."""

from __future__ import annotations

import attrs

from tinker_core.errors import InvalidRequestError
from tinker_core.types import CompletionPage, JsonObject, QueueStatus, RequestError, SampleTarget
from tinker_server.wire.body import Body
from tinker_server.wire.fields import Fields, show
from tinker_server.wire.results import payload_bytes

METADATA_BYTES = 1024 * 1024
"""Payloads from this size on are announced first to clients that allow it, so that they can bound what they hold."""
_TARGET = "sampling_session"


@attrs.frozen(kw_only=True)
class ResultRequest:
    """One result to fetch."""

    request_id: str
    allow_metadata_only: bool
    """Whether the client understands an announcement in place of a large payload; it then asks once more."""


@attrs.frozen(kw_only=True)
class CompletionsRequest:
    """A poll for all samples of one sampling client."""

    target: SampleTarget
    cursor: int
    timeout: float | None
    """Seconds that the client wants to wait at most; None leaves it to the server."""
    retrieved: tuple[str, ...]


def read_retrieve_future(body: Body) -> ResultRequest:
    """A result to fetch."""
    fields = Fields(body.json_object(), "")
    request = ResultRequest(
        request_id=fields.text("request_id"), allow_metadata_only=fields.boolean("allow_metadata_only", False)
    )
    fields.log_unknown()
    return request


def read_cancel_future(body: Body) -> str:
    """The id of a sample to stop."""
    fields = Fields(body.json_object(), "")
    request_id = fields.text("request_id")
    fields.log_unknown()
    return request_id


def read_retrieve_futures(body: Body) -> CompletionsRequest:
    """A poll for a sampling client."""
    fields = Fields(body.json_object(), "")
    target = Fields(fields.mapping("target"), "target")
    kind = target.text("type", _TARGET)
    if kind != _TARGET:
        raise InvalidRequestError(f"target.type must be {_TARGET!r}, got {show(kind)}")
    retrieved = fields.objects("retrieved_request_ids", [])
    ids = tuple(item for item in retrieved if isinstance(item, str))
    if len(ids) != len(retrieved):
        raise InvalidRequestError("retrieved_request_ids must be a list of texts")
    timeout = fields.number("timeout", None)
    if timeout is not None and not timeout >= 0:
        raise InvalidRequestError(f"timeout must be at least 0, got {timeout}")
    request = CompletionsRequest(
        target=SampleTarget(
            sampling_session_id=target.text("sampling_session_id"), clone_id=target.integer("cloned_sampler_id", 0)
        ),
        cursor=fields.integer("prev_cursor", 0),
        timeout=timeout,
        retrieved=ids,
    )
    target.log_unknown()
    fields.log_unknown()
    return request


def pending_to_json(request_id: str, status: QueueStatus) -> JsonObject:
    """The answer to a poll whose result is not there yet."""
    answer: JsonObject = {"type": "try_again", "request_id": request_id, "queue_state": status.state.value}
    if status.reason is not None:
        answer["queue_state_reason"] = status.reason
    return answer


def announcement_to_json(payload_size: int) -> JsonObject:
    """The answer in place of a large payload."""
    return {"status": "complete_metadata", "response_payload_size": payload_size}


def completions_to_json(page: CompletionPage) -> JsonObject:
    """SDK ``FuturesRetrieveResponse``."""
    completions: list[JsonObject] = []
    for item in page.completions:
        if isinstance(item.output, RequestError):
            completions.append({"state": "failed", "request_id": item.request_id})
            continue
        size = payload_bytes(item.output)
        completions.append(
            {"state": "finished", "request_id": item.request_id, "response_payload_uncompressed_size": size}
        )
    return {"completions": completions, "cursor": page.cursor}
