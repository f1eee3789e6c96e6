"""What goes into the journal and what comes out of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import attrs

_LARGEST = 2**63


def _fits(instance: object, attribute: attrs.Attribute[Any], value: int | None) -> None:
    if value is not None and not -_LARGEST <= value < _LARGEST:
        raise ValueError(f"{type(instance).__name__}.{attribute.name} does not fit into 64 bits: {value}")


def _text(instance: object, attribute: attrs.Attribute[Any], value: str | None) -> None:
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{type(instance).__name__}.{attribute.name} is not valid text: {error}") from error


class Fate(StrEnum):
    """What becomes of a request's body once it has its result."""

    KEEP = "keep"
    """It changed its model, or belongs to a group: kept until a snapshot covers it, or the group is forgotten."""
    PLACE = "place"
    """Only its place in its model's order is kept until a snapshot covers it: it failed, or changed nothing."""
    DROP = "drop"
    """It has no place in any model's order: nothing is kept."""


@attrs.frozen(kw_only=True)
class AcceptedRow:
    """A request to be accepted."""

    number: int = attrs.field(validator=_fits)
    """From `Journal.next_number`."""
    scope: str = attrs.field(validator=_text)
    """What ``place`` counts in, owner included. ``(scope, place)`` is the key by which a repeated request is found."""
    place: int = attrs.field(validator=_fits)
    owner: str = attrs.field(validator=_text)
    model_id: str | None = attrs.field(validator=_text)
    """Set together with ``seq_id``: its place in a model's order."""
    seq_id: int | None = attrs.field(validator=_fits)
    group: str | None = attrs.field(default=None, validator=_text)
    """With `Fate.KEEP` and no model, the body lives until `Journal.forget_group` names this group."""
    head: bytes
    """Small; kept as long as the request or its result."""
    body: bytes | None
    """None: an unreadable request, with nothing to run."""

    def __attrs_post_init__(self) -> None:
        if (self.model_id is None) != (self.seq_id is None):
            raise ValueError("model_id and seq_id belong together: set both or neither")


@attrs.frozen(kw_only=True)
class ResultRow:
    """The result of a request."""

    number: int = attrs.field(validator=_fits)
    owner: str = attrs.field(validator=_text)
    payload: bytes
    fate: Fate
    keep_until: float
    """Unix seconds after which `Journal.prune` may drop it."""


@attrs.frozen(kw_only=True)
class ModelRow:
    """A live model and how far its snapshot reaches."""

    model_id: str = attrs.field(validator=_text)
    next_seq_id: int = attrs.field(validator=_fits)
    """Requests below are covered by the snapshot."""
    state: bytes
    """Opaque to the journal."""


@attrs.frozen(kw_only=True)
class PendingRow:
    """An accepted request without a result."""

    number: int
    head: bytes
    model_id: str | None
    seq_id: int | None
    attempts: int
    """How often `Journal.note_attempts` named it."""
    has_body: bool


@attrs.frozen(kw_only=True)
class ReplayRow:
    """A resolved request of a model that no snapshot covers yet."""

    number: int
    head: bytes
    model_id: str
    seq_id: int
    fate: Fate
    """`Fate.KEEP` or `Fate.PLACE`."""


@attrs.frozen(kw_only=True)
class GroupRow:
    """A resolved request whose body is kept for a group."""

    number: int
    group: str
    head: bytes


@attrs.frozen(kw_only=True)
class Recovered:
    """What an earlier process left."""

    models: tuple[ModelRow, ...]
    pending: tuple[PendingRow, ...]
    """In order of number."""
    replay: tuple[ReplayRow, ...]
    """In order of model and ``seq_id``; their models need not have a row."""
    groups: tuple[GroupRow, ...]
    """In order of number."""
    damaged: tuple[str, ...]
    """Names of records that are not among the others because their checksum does not fit, or that are missing."""
    damaged_models: frozenset[str]
    """The models of damaged records, as far as they are known."""


@attrs.frozen(kw_only=True)
class JournalStats:
    """Figures of a journal at this moment."""

    body_bytes: int
    """Bytes of the bodies kept."""
    result_bytes: int
    """Bytes of the results kept."""
    max_bytes: int
    """What bodies and results together may take before requests are refused."""
    file_bytes: int
    """Bytes of those bodies and results that are in files of their own."""
    pending: int
    """Accepted requests without a result."""
    results: int
    """Results kept."""
    waiting: int
    """Appends that are not durable yet."""
    waiting_seconds: float
    """How long the oldest of them has waited."""
    commits: int
    """Transactions of this process."""
    appends: int
    """Appends in them."""
    largest_batch: int
    """Most appends in one transaction."""
    full: str | None
    """Why the disk takes no more, while it does not."""
    reserve_bytes: int
    """Bytes held back on the disk for results when it gets full; 0 while they are given away."""
