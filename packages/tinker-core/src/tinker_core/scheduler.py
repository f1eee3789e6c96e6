"""What to run next on one base model: pure bookkeeping, no asyncio, no I/O, no clock of its own.

Each model's requests run in the order of their seq_id, whatever order they arrive in.  Passes of different models are
packed into one piece of work within a token budget; optimizer steps of different models likewise, up to `MAX_STEPS`;
everything else runs alone.  A work is one of these, or one pass that exceeds the budget by itself.

Owners get equal shares, however many models they have, and so do the models of one owner: `tinker_core.fair_shares`
decides whose turn it is.  A request costs its tokens, and an eighth of the budget at least; so do optimizer steps,
saves, loads and creations.  The first request of an owner who has not had more than a fair share waits for the running
work, and then for works that are led by requests which cost at most ``A * c + q`` tokens together: ``c`` is its own
cost, ``A`` the number of owners with work, ``q`` the cost of the largest request.  However many requests others have
queued, and however large they are, a small one waits for the one that runs, one more at most, and for its equals.

A missing seq_id holds its model's later requests.  The SDK sends the parts of one call as 2, 3, …, 1, so forward and
forward_backward prove nothing about lower numbers.  Any other request is sent only after all lower ones were answered:
its arrival proves that a missing number will never come, and the number is skipped.  A gap without that proof is
skipped when its deadline passes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from enum import StrEnum

import attrs

from tinker_core.errors import SkippedSequenceError, UnknownModelError
from tinker_core.fair_shares import FairShares
from tinker_core.types import RequestType

GAP_SECONDS = 600.0
"""How long a missing seq_id may hold its model; above the 5 minutes for which the SDK retries a submission."""
MAX_STEPS = 64
"""Most optimizer steps of one work."""


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
    alone: bool = False
    """Whether it shares no work with others: of requests under which workers died."""

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
    offered: QueuedRequest | None = None
    """What the queue has put up for the next work."""
    offered_at: float = 0.0

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
        self._shares = FairShares(token_budget)
        self._gaps: list[tuple[float, str]] = []
        """When gaps end, by model; some have ended already, in another way."""
        self._num_queued = 0
        self._work: Work | None = None
        self._owners: list[str] = []
        """Of the running work's requests; a model may go while it runs."""
        self._aside: list[Work] = []
        """Work that others need not wait for."""
        self._skipped: list[SkippedGap] = []

    def add_model(self, model_id: str, *, owner: str = "", next_seq_id: int = 0) -> None:
        """Open the queue of a model, which begins with its creation, seq_id 0, unless that lies behind it."""
        self.remove_model(model_id)
        self._models[model_id] = _ModelQueue(model_id=model_id, owner=owner, next_seq_id=next_seq_id)

    def rewind(self, model_id: str, next_seq_id: int, requests: Iterable[QueuedRequest], now: float) -> None:
        """Go back to an earlier place in a model's order, with the requests that have to run again from there.

        What waits in the queue goes on waiting. Raises `UnknownModelError`.
        """
        queue = self._models.get(model_id)
        if queue is None:
            raise UnknownModelError(model_id)
        queue.next_seq_id = next_seq_id
        queue.running = False
        self._num_queued -= len(queue.pending)
        queue.pending |= {request.seq_id: request for request in requests}
        self._num_queued += len(queue.pending)
        self._note_proof(queue, queue.pending.values())
        self._update(queue, now)

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
        self._shares.withdraw(model_id)
        self._shares.forget(model_id, queue.owner)
        self._num_queued -= len(queue.pending)
        return tuple(queue.pending[seq_id] for seq_id in sorted(queue.pending))

    def submit(self, request: QueuedRequest, now: float) -> None:
        """Queue a request; raises `UnknownModelError`, or `SkippedSequenceError` when its turn has passed."""
        queue = self._models.get(request.model_id)
        if queue is None:
            raise UnknownModelError(request.model_id)
        if request.seq_id < queue.next_seq_id or request.seq_id in queue.pending:
            raise SkippedSequenceError(request.model_id, request.seq_id)
        queue.pending[request.seq_id] = request
        self._num_queued += 1
        self._note_proof(queue, (request,))
        self._update(queue, now)

    def next(self, now: float) -> Work | None:
        """The work to run now, or None while other work runs or nothing can."""
        if self._work is not None:
            return None
        self._end_gaps(now)
        chosen = [self._begin(model_id) for model_id in self._shares.take(self._max_models_per_work)]
        if not chosen:
            return None
        self._work = Work(kind=chosen[0].kind, requests=tuple(chosen))
        return self._work

    def _begin(self, model_id: str) -> QueuedRequest:
        queue = self._models[model_id]
        request = queue.pending.pop(queue.next_seq_id)
        self._num_queued -= 1
        queue.next_seq_id = request.seq_id + 1
        queue.running = True
        queue.offered = None
        self._owners.append(queue.owner)
        return request

    def finish(self, work: Work, now: float) -> None:
        """Note that work has ended, well or not, so that its models' next requests may run."""
        owners: list[str] = []
        if self._work is work:
            self._work = None
            owners, self._owners = self._owners, []
        else:
            self._aside = [other for other in self._aside if other is not work]
        for request in work.requests:
            queue = self._models.get(request.model_id)
            if queue is not None:
                queue.running = False
                self._update(queue, now)
        for owner in owners:
            self._shares.done(owner)

    def step_aside(self, work: Work) -> None:
        """Let other models work beside what is running, which holds up its own models only; `finish` ends it."""
        assert self._work is work
        self._work = None
        self._aside.append(work)
        owners, self._owners = self._owners, []
        for owner in owners:
            self._shares.done(owner)

    def is_running(self, model_id: str) -> bool:
        """Whether a request of a model runs."""
        queue = self._models.get(model_id)
        return queue is not None and queue.running

    def deadline(self) -> float | None:
        """When the oldest gap will be skipped; None without gaps."""
        while self._gaps and not self._is_gap(*self._gaps[0]):
            heapq.heappop(self._gaps)
        return self._gaps[0][0] if self._gaps else None

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
        return self._num_queued

    def longest_wait(self, now: float) -> float:
        """How long the request has waited for its turn that waits longest, of those that could run; 0 without any."""
        offers = (queue.offered_at for queue in self._models.values() if queue.offered is not None)
        return now - min(offers, default=now)

    def num_running(self) -> int:
        """Requests of the running work, and of what runs beside it."""
        beside = sum(len(work.requests) for work in self._aside)
        return beside + (len(self._work.requests) if self._work is not None else 0)

    # --- offers and gaps ----------------------------------------------------------------------------------------------

    def _update(self, queue: _ModelQueue, now: float) -> None:
        """Bring a queue's gap and its offer up to date."""
        self._update_gap(queue, now)
        head = queue.head()
        if head is queue.offered:
            return
        if queue.offered is not None:
            self._shares.withdraw(queue.model_id)
        if head is not None:
            self._shares.offer(
                queue.model_id,
                owner=queue.owner,
                kind=None if head.alone or head.kind is WorkKind.SINGLE else head.kind,
                size=self._token_budget / MAX_STEPS if head.kind is WorkKind.STEP else head.num_tokens,
            )
        queue.offered = head
        queue.offered_at = now

    def _note_proof(self, queue: _ModelQueue, requests: Iterable[QueuedRequest]) -> None:
        proofs = [request.seq_id for request in requests if request.proves or request.kind is not WorkKind.PASS]
        queue.proven_seq_id = max([queue.proven_seq_id, *proofs])

    def _is_gap(self, ends: float, model_id: str) -> bool:
        queue = self._models.get(model_id)
        return queue is not None and queue.blocked_since is not None and queue.blocked_since + self._gap_seconds == ends

    def _end_gaps(self, now: float) -> None:
        """Skip the gaps whose time is over."""
        while self._gaps and self._gaps[0][0] <= now:
            gap = heapq.heappop(self._gaps)
            if self._is_gap(*gap):
                self._update(self._models[gap[1]], now)

    def _update_gap(self, queue: _ModelQueue, now: float) -> None:
        """Start, end or skip the gap in front of a model's waiting requests."""
        if not queue.blocked:
            queue.blocked_since = None
            return
        if queue.blocked_since is None:
            queue.blocked_since = now
            heapq.heappush(self._gaps, (now + self._gap_seconds, queue.model_id))
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
