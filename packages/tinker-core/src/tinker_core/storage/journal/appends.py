"""What waits for the writer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import attrs

from tinker_core.storage.journal.records import AcceptedRow, ModelRow, ResultRow


@attrs.define(eq=False, kw_only=True)
class Append:
    """One call of the journal; ``future`` gets what the writer makes of it."""

    future: asyncio.Future[Any] | None = None
    since: float = attrs.field(factory=time.monotonic)
    """Monotonic time of the call."""

    @property
    def size(self) -> int:
        """Bytes that it carries."""
        return 0


@attrs.define(eq=False, kw_only=True)
class Accept(Append):
    """A request; its future gets the head of the earlier one, or None."""

    row: AcceptedRow
    in_file: bool
    """Its body is in a side file already."""
    check: int
    """Checksum of the body."""
    refused: str | None
    """Why it cannot be taken, unless there is an earlier one."""

    @property
    def size(self) -> int:
        """Bytes of head and body that are still to be written."""
        return len(self.row.head) + (0 if self.in_file else len(self.row.body or b""))


@attrs.define(eq=False, kw_only=True)
class Resolve(Append):
    """Results and what snapshots cover."""

    rows: Sequence[ResultRow]
    models: Sequence[ModelRow]

    @property
    def size(self) -> int:
        """Bytes of the results."""
        return sum(len(row.payload) for row in self.rows) + sum(len(row.state) for row in self.models)


@attrs.define(eq=False, kw_only=True)
class Sweep(Append):
    """Going on with dropping what snapshots cover."""

    model_ids: Sequence[str]


@attrs.define(eq=False, kw_only=True)
class ForgetModel(Append):
    """The end of a model."""

    model_id: str


@attrs.define(eq=False, kw_only=True)
class ForgetGroup(Append):
    """The end of a group."""

    group: str


@attrs.define(eq=False, kw_only=True)
class ForgetDamaged(Append):
    """The end of all records whose checksums do not fit."""


@attrs.define(eq=False, kw_only=True)
class NoteAttempts(Append):
    """Requests that ran when a process died."""

    numbers: Sequence[int]


@attrs.define(eq=False, kw_only=True)
class Prune(Append):
    """Results whose time is over; its future gets the next ``keep_until`` and whether there is more to drop."""

    now: float


@attrs.define(eq=False, kw_only=True)
class Delivered(Append):
    """New ends of results' times by number."""

    times: dict[int, float]
