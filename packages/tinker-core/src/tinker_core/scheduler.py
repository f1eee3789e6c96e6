"""What to run next on one base model: pure bookkeeping, no asyncio, no I/O, no clock of its own.

Each model's requests run in the order of their seq_id, whatever order they arrive in.  Passes of different models are
packed into one piece of work within a token budget; optimizer steps of different models likewise; everything else
runs alone.  Models take turns.

A missing seq_id holds its model's later requests.  The SDK sends the parts of one call as 2, 3, …, 1, so forward and
forward_backward prove nothing about lower numbers.  Any other request is sent only after all lower ones were answered:
its arrival proves that a missing number will never come, and the number is skipped.  A gap without that proof is
skipped when its deadline passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import StrEnum

import attrs

from tinker_core.errors import SkippedSequenceError, UnknownModelError
from tinker_core.types import RequestType

GAP_SECONDS = 600.0
"""How long a missing seq_id may hold its model; above the 5 minutes for which the SDK retries a submission."""


class WorkKind(StrEnum):
    """What kinds of requests run together."""

    PASS = "pass"
    STEP = "step"
    SINGLE = "single"


_KINDS = {
    RequestType.FORWARD: WorkKind.PASS,
    RequestType.FORWARD_BACKWARD: WorkKind.PASS,
    RequestType.OPTIM_STEP: WorkKind.STEP,
}


@attrs.frozen(kw_only=True)
class QueuedRequest:
    """What the scheduler needs to know of a request."""

    request_id: str
    request_type: RequestType
    model_id: str
    seq_id: int
    """Position in the model's order; the creation itself is 0."""
    num_tokens: int = 0
    proves: bool = False
    """Whether it is known that no lower number is still to come: of requests that ran before."""

    @property
    def kind(self) -> WorkKind:
        """What it may run together with."""
        return _KINDS.get(self.request_type, WorkKind.SINGLE)


@attrs.frozen(kw_only=True)
class Work:
    """Requests that run together now; at most one of each model."""

    kind: WorkKind
    requests: tuple[QueuedRequest, ...]


@attrs.frozen(kw_only=True)
class SkippedGap:
    """A range of seq_ids, both ends included, that will not be waited for any longer."""

    model_id: str
    first_seq_id: int
    last_seq_id: int
    timed_out: bool
    """Whether a deadline passed, rather than a later request having proved it."""


@attrs.define(kw_only=True, eq=False)
class _ModelQueue:
    model_id: str
    owner: str = ""
    next_seq_id: int = 0
    pending: dict[int, QueuedRequest] = attrs.field(factory=dict)
    proven_seq_id: int = -1
    """No number below this one is still to come."""
    blocked_since: float | None = None
    running: bool = False

    def head(self) -> QueuedRequest | None:
        """The request whose turn it is, if it has arrived and its predecessor is done."""
        return None if self.running else self.pending.get(self.next_seq_id)

    @property
    def blocked(self) -> bool:
        """Whether requests wait behind a missing number."""
        return bool(self.pending) and self.next_seq_id not in self.pending


class Scheduler:
    """Orders and packs the training requests of one base model."""

    def __init__(
        self, *, token_budget: int, gap_seconds: float = GAP_SECONDS, max_models_per_work: int | None = None
    ) -> None:
        self._token_budget = token_budget
        self._max_models_per_work = max_models_per_work
        self._gap_seconds = gap_seconds
        self._models: dict[str, _ModelQueue] = {}
        self._turns: deque[str] = deque()
        self._work: Work | None = None
        self._skipped: list[SkippedGap] = []

    def add_model(self, model_id: str, *, owner: str = "", next_seq_id: int = 0) -> None:
        """Open the queue of a model, which begins with its creation, seq_id 0, unless that lies behind it."""
        self._models[model_id] = _ModelQueue(model_id=model_id, owner=owner, next_seq_id=next_seq_id)
        self._turns.append(model_id)

    def rewind(self, model_id: str, next_seq_id: int, requests: Iterable[QueuedRequest], now: float) -> None:
        """Go back to an earlier place in a model's order, with the requests that have to run again from there.

        What waits in the queue goes on waiting. Raises `UnknownModelError`.
        """
        queue = self._models.get(model_id)
        if queue is None:
            raise UnknownModelError(model_id)
        queue.next_seq_id = next_seq_id
        queue.running = False
        queue.pending |= {request.seq_id: request for request in requests}
        self._note_proof(queue, queue.pending.values())
        self._update_gap(queue, now)

    def next_seq_id(self, model_id: str) -> int:
        """The lowest number that has not begun to run; raises `UnknownModelError`."""
        if model_id not in self._models:
            raise UnknownModelError(model_id)
        return self._models[model_id].next_seq_id

    def is_idle(self, model_id: str) -> bool:
        """Whether nothing of a model runs or waits."""
        queue = self._models.get(model_id)
        return queue is None or not (queue.running or queue.pending)

    def model_ids(self) -> tuple[str, ...]:
        """The models with an open queue."""
        return tuple(self._models)

    def remove_model(self, model_id: str) -> tuple[QueuedRequest, ...]:
        """Close a model's queue and return what was still waiting in it."""
        queue = self._models.pop(model_id, None)
        if queue is None:
            return ()
        self._turns.remove(model_id)
        return tuple(queue.pending[seq_id] for seq_id in sorted(queue.pending))

    def submit(self, request: QueuedRequest, now: float) -> None:
        """Queue a request; raises `UnknownModelError`, or `SkippedSequenceError` when its turn has passed."""
        queue = self._models.get(request.model_id)
        if queue is None:
            raise UnknownModelError(request.model_id)
        if request.seq_id < queue.next_seq_id or request.seq_id in queue.pending:
            raise SkippedSequenceError(request.model_id, request.seq_id)
        queue.pending[request.seq_id] = request
        self._note_proof(queue, (request,))
        self._update_gap(queue, now)

    def next(self, now: float) -> Work | None:
        """The work to run now, or None while other work runs or nothing can."""
        if self._work is not None:
            return None
        for queue in self._models.values():
            self._update_gap(queue, now)
        ready = [head for model_id in self._turns if (head := self._models[model_id].head()) is not None]
        if not ready:
            return None
        chosen = self._pack(ready)
        for request in chosen:
            queue = self._models[request.model_id]
            del queue.pending[request.seq_id]
            queue.next_seq_id = request.seq_id + 1
            queue.running = True
            self._turns.remove(request.model_id)
            self._turns.append(request.model_id)
        self._work = Work(kind=chosen[0].kind, requests=tuple(chosen))
        return self._work

    def _pack(self, ready: list[QueuedRequest]) -> list[QueuedRequest]:
        """The first in turn, and what fits beside it; what does not fit keeps its place and is first next time."""
        lead = ready[0]
        if lead.kind is WorkKind.SINGLE:
            return [lead]
        chosen, num_tokens = [lead], lead.num_tokens
        for request in ready[1:]:
            if self._max_models_per_work is not None and len(chosen) >= self._max_models_per_work:
                break
            if request.kind is lead.kind and num_tokens + request.num_tokens <= self._token_budget:
                chosen.append(request)
                num_tokens += request.num_tokens
        return chosen

    def finish(self, work: Work, now: float) -> None:
        """Note that work has ended, well or not, so that its models' next requests may run."""
        self._work = None
        for request in work.requests:
            queue = self._models.get(request.model_id)
            if queue is not None:
                queue.running = False
                self._update_gap(queue, now)

    def deadline(self) -> float | None:
        """When the oldest gap will be skipped; None without gaps."""
        waits = [queue.blocked_since for queue in self._models.values() if queue.blocked_since is not None]
        return min(waits) + self._gap_seconds if waits else None

    def take_skipped(self) -> tuple[SkippedGap, ...]:
        """The gaps skipped since the last call, for the log."""
        skipped, self._skipped = tuple(self._skipped), []
        return skipped

    def can_progress(self, model_id: str) -> bool:
        """Whether a model works, or will, without any request that is still to arrive."""
        queue = self._models.get(model_id)
        return queue is not None and (queue.running or queue.next_seq_id in queue.pending)

    def num_queued(self) -> int:
        """Requests waiting."""
        return sum(len(queue.pending) for queue in self._models.values())

    def num_running(self) -> int:
        """Requests of the running work."""
        return len(self._work.requests) if self._work is not None else 0

    def _note_proof(self, queue: _ModelQueue, requests: Iterable[QueuedRequest]) -> None:
        proofs = [request.seq_id for request in requests if request.proves or request.kind is not WorkKind.PASS]
        queue.proven_seq_id = max([queue.proven_seq_id, *proofs])

    def _update_gap(self, queue: _ModelQueue, now: float) -> None:
        """Start, end or skip the gap in front of a model's waiting requests."""
        if not queue.blocked:
            queue.blocked_since = None
            return
        if queue.blocked_since is None:
            queue.blocked_since = now
        proven = queue.next_seq_id < queue.proven_seq_id
        timed_out = now >= queue.blocked_since + self._gap_seconds
        if not (proven or timed_out):
            return
        first = queue.next_seq_id
        queue.next_seq_id = min(queue.pending)
        queue.blocked_since = None
        self._skipped.append(
            SkippedGap(
                model_id=queue.model_id,
                first_seq_id=first,
                last_seq_id=queue.next_seq_id - 1,
                timed_out=not proven,
            )
        )
