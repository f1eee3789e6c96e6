"""What one model has done since its last snapshot, and how that is written into the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import attrs
import msgpack

from tinker_core.engine.futures import PendingResult
from tinker_core.errors import TinkerError
from tinker_core.scheduler import QueuedRequest
from tinker_core.storage.journal import Fate, ModelRow
from tinker_core.types import AcceptedRequest, RequestType


@attrs.frozen(kw_only=True)
class Done:
    """A request that has its result and is not covered by a snapshot."""

    number: int
    request: QueuedRequest
    fate: Fate
    size: int = 0
    publishes: bool = False


@attrs.define(kw_only=True, eq=False)
class ModelState:
    """One live model, in memory or not."""

    model_id: str
    snapshot: str | None = None
    covered: int = 0
    """The snapshot covers what is numbered below."""
    replaced: list[str] = attrs.field(factory=list)
    """Snapshots that count no longer, and whose files are still there."""
    done: dict[int, Done] = attrs.field(factory=dict)
    """What is not covered, by number."""
    num_steps: int = 0
    num_bytes: int = 0
    changed_at: float | None = None
    """When it first changed in a way that no snapshot covers."""
    used_at: float = 0.0
    writing: asyncio.Task[None] | None = None
    retry_at: float = 0.0
    """A snapshot that failed is not tried again before."""
    deaths: int = 0
    """How often workers died under its work, in a row."""
    lost: TinkerError | None = None

    @property
    def changed(self) -> bool:
        """Whether it changed in a way that no snapshot covers."""
        return self.changed_at is not None

    def note_done(self, done: Done, now: float) -> None:
        """A request has its result."""
        if done.request.seq_id < self.covered:
            return
        self.done[done.request.seq_id] = done
        self.deaths = 0
        self._count(done, now)

    def _count(self, done: Done, now: float) -> None:
        if done.fate is not Fate.KEEP:
            return
        self.num_steps += done.request.request_type is RequestType.OPTIM_STEP
        self.num_bytes += done.size
        if self.changed_at is None:
            self.changed_at = now

    def cover(self, row: ModelRow, now: float) -> None:
        """A snapshot counts from now on."""
        if self.snapshot is not None and self.snapshot != snapshot_of(row):
            self.replaced.append(self.snapshot)
        self.snapshot, self.covered = snapshot_of(row), row.next_seq_id
        self.done = {seq_id: done for seq_id, done in self.done.items() if seq_id >= row.next_seq_id}
        self.num_steps, self.num_bytes, self.changed_at = 0, 0, None
        for done in self.done.values():
            self._count(done, now)


def model_row(model_id: str, next_seq_id: int, *, snapshot: str | None, inflight: str | None) -> ModelRow:
    """What the journal keeps of a live model."""
    state: Mapping[str, str | None] = {"snapshot": snapshot, "inflight": inflight}
    return ModelRow(model_id=model_id, next_seq_id=next_seq_id, state=bytes(msgpack.packb(state)))


def snapshot_of(row: ModelRow) -> str | None:
    """The name of the snapshot that counts."""
    return _field(row, "snapshot")


def inflight_of(row: ModelRow) -> str | None:
    """The revision that was the model's inflight target when the snapshot was taken."""
    return _field(row, "inflight")


def _field(row: ModelRow, name: str) -> str | None:
    value = msgpack.unpackb(row.state).get(name)
    return None if value is None else str(value)


def queued(accepted: AcceptedRequest, model_id: str, seq_id: int, num_tokens: int) -> QueuedRequest:
    """What the scheduler needs to know of a request."""
    return QueuedRequest(
        request_id=accepted.request_id,
        request_type=accepted.request_type,
        model_id=model_id,
        seq_id=seq_id,
        num_tokens=num_tokens,
    )


def done_of(entry: PendingResult, model_id: str, seq_id: int, fate: Fate) -> Done:
    """What has to be remembered of a request that has its result."""
    request = queued(entry.accepted, model_id, seq_id, entry.num_tokens)
    return Done(number=entry.number, request=request, fate=fate, size=entry.size, publishes=entry.publishes)
