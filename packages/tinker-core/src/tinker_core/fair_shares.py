"""Whose request is next: fair between owners, and within an owner between models. Pure bookkeeping, without a clock.

Every owner has an account of what it was given, in tokens. Time is virtual and counted in tokens too: it rises by the
cost of each request that *leads* a piece of work, divided by the number of active owners, which is what everyone would
have been given if all were served at once. An owner is *eligible* when its account is not ahead of time. The next work
is led by the eligible owner whose request would be over first: the one with the smallest sum of account and cost. Other
requests of the same kind *ride along* while there is room; they are charged as well, but do not move time, and no
account gets further ahead by riding than one full work. An owner that comes back from idleness starts at the present
time at least: nobody saves up.

Within an owner, models take turns by what each was given. A request that is first in its owner's line stays first.

**The bound.** Let a request become the first in its owner's line. Let ``c`` be its cost, ``d`` how far its owner's
account is ahead (0 for whoever asks for no more than a fair share), ``A`` the number of active owners and ``q`` the
largest cost of any request. Then the works that start before it, besides the one that is running, are led by requests
that cost at most ``A * (c + d) + q`` together. As no work holds more than `LEADS_PER_WORK` times the cost of its lead,
at most ``LEADS_PER_WORK * (A * (c + d) + q)`` tokens run in them.

*Proof.* Until it runs, every lead is due no later than it is: at ``D``, the time at which it became first plus
``d + c``. Look back to the last moment when a lead was due later than ``D``, or when nobody was eligible and time went
on to the smallest account. What leads since then was not eligible at that moment or was not first yet, so the accounts
of its owners have risen since from that moment's time or above, and to ``D`` at most. Up to the time at which our
request became first, the share of all active owners together is what the leads since that moment have cost, and all of
these but the earliest, which costs ``q`` at most, belong to what is due by ``D``. What of that may still lead is the
rest: ``c + d`` for each active owner, and ``q``.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable

import attrs

LEADS_PER_WORK = 8
"""A request costs at least one such part of the budget, so no work holds more than so many times its lead's cost."""
LOOK_AHEAD = 64
"""How many requests that do not fit are passed over in search of one that does."""


@attrs.define(kw_only=True, eq=False)
class _Offer:
    """A request that may run now; at most one of each model."""

    model_id: str
    line: _Line
    kind: Hashable | None
    size: float
    cost: float
    start: float
    """What the model had been given when it made the offer, in the time of its owner's line."""
    gone: bool = False
    """Whether it was taken or withdrawn."""


_Place = tuple[float, int, _Offer]
"""When, a tie-breaker, and which offer."""
_Ride = tuple[float, int, "_Line", int]
"""When, a tie-breaker, whose, and the version of the line that it was computed from."""


@attrs.define(kw_only=True, eq=False)
class _Line:
    """One owner's account and waiting offers."""

    owner: str
    account: float
    clock: float = 0.0
    """The start of the offer that was taken last."""
    finished: dict[str, float] = attrs.field(factory=dict)
    """What each model was given, in the time of ``clock``."""
    busy: int = 0
    """Models with an offer, and models with running work."""
    running: int = 0
    """Models with running work."""
    active: bool = False
    """Whether it is busy, or ahead of time."""
    waiting: dict[Hashable | None, list[_Place]] = attrs.field(factory=dict)
    """Offers by kind, in the order of their start."""
    first: _Offer | None = None
    """The offer whose turn it is. It stays that, and keeps its place among the owners, whatever else rides along."""
    version: int = 0

    def top(self, kind: Hashable | None) -> _Offer | None:
        """The offer of a kind that rides along next."""
        heap = self.waiting.get(kind, [])
        while heap and heap[0][2].gone:
            heapq.heappop(heap)
        return heap[0][2] if heap else None


class FairShares:
    """Takes offers and says which of them make the next piece of work, of ``budget`` tokens."""

    def __init__(self, budget: int) -> None:
        self._budget = float(budget)
        self._time = 0.0
        self._num_active = 0
        self._lines: dict[str, _Line] = {}
        self._offers: dict[str, _Offer] = {}
        self._order = itertools.count()
        self._eligible: list[_Place] = []
        """First offers of lines that are not ahead, by when they are due."""
        self._ahead: list[_Place] = []
        """First offers of lines that are ahead, by the line's account."""
        self._riders: dict[Hashable, list[_Ride]] = {}
        """Lines with an offer of a kind, by when that offer would be due."""
        self._leaving: list[_Ride] = []
        """Idle lines that are ahead, by their account."""

    @property
    def num_active(self) -> int:
        """Owners with an offer or running work, or ahead of time."""
        return self._num_active

    def ahead(self, owner: str) -> float:
        """By how many tokens an owner was given more than a fair share; 0 for less."""
        line = self._lines.get(owner)
        return max(0.0, line.account - self._time) if line is not None else 0.0

    # --- offers -------------------------------------------------------------------------------------------------------

    def offer(self, model_id: str, *, owner: str, kind: Hashable | None, size: float) -> None:
        """Put up the next request of a model that has none up, to run with others of its kind; alone without a kind."""
        line = self._lines.get(owner)
        if line is None:
            line = self._lines[owner] = _Line(owner=owner, account=self._time)
        if line.busy == 0:
            line.account = max(line.account, self._time)
        line.busy += 1
        if not line.active:
            line.active = True
            self._num_active += 1
        offer = _Offer(
            model_id=model_id,
            line=line,
            kind=kind,
            size=size,
            cost=self.cost_of(size),
            start=max(line.clock, line.finished.get(model_id, 0.0)),
        )
        self._offers[model_id] = offer
        heapq.heappush(line.waiting.setdefault(kind, []), (offer.start, next(self._order), offer))
        self._settle(line)
        if line.top(kind) is offer:
            self._announce(line)

    def withdraw(self, model_id: str) -> None:
        """Take a model's offer back, if it has one up."""
        offer = self._offers.get(model_id)
        if offer is not None:
            self._drop(offer)
            self._settle(offer.line)
            self._announce(offer.line)
            self._rest(offer.line)

    def done(self, owner: str) -> None:
        """Note that a model's work has ended; call it after the model's next offer, if that can be made already."""
        line = self._lines[owner]
        line.running -= 1
        self._rest(line)
        self._settle(line)

    def forget(self, model_id: str, owner: str) -> None:
        """Drop what is known of a model without an offer."""
        line = self._lines.get(owner)
        if line is not None:
            line.finished.pop(model_id, None)
            if not line.active and not line.finished:
                del self._lines[owner]

    def cost_of(self, size: float) -> float:
        """What a request is charged: its tokens, or its part of a work that it takes at least."""
        return max(size, self._budget / LEADS_PER_WORK)

    # --- work ---------------------------------------------------------------------------------------------------------

    def take(self, most: int | None = None) -> list[str]:
        """The models whose offers run together now, ``most`` of them; the lead comes first. Empty without offers."""
        lead = self._lead()
        if lead is None:
            return []
        line = lead.line
        line.account += lead.cost
        self._advance(self._time + lead.cost / self._num_active)
        self._give(lead)
        taken = [lead]
        if lead.kind is not None:
            self._add_riders(taken, most)
        return [offer.model_id for offer in taken]

    def _lead(self) -> _Offer | None:
        self._admit()
        if not _peek(self._eligible) and (nearest := _peek(self._ahead)):
            self._advance(nearest[0])
            self._admit()
        found = _peek(self._eligible)
        return found[2] if found else None

    def _add_riders(self, taken: list[_Offer], most: int | None) -> None:
        kind, room = taken[0].kind, self._budget - taken[0].size
        passed: list[_Place] = []
        while room > 0 and len(passed) < LOOK_AHEAD and (most is None or len(taken) < most):
            line = self._next_rider(kind)
            if line is None:
                break
            place = line.waiting[kind][0]
            offer = place[2]
            if offer.size <= room:
                room -= offer.size
                line.account = max(line.account, min(line.account + offer.cost, self._time + self._budget))
                self._give(offer)
                taken.append(offer)
            else:
                passed.append(heapq.heappop(line.waiting[kind]))
                self._announce(line)
        for place in passed:
            heapq.heappush(place[2].line.waiting[kind], place)
        for line in {place[2].line.owner: place[2].line for place in passed}.values():
            self._announce(line)

    def _next_rider(self, kind: Hashable) -> _Line | None:
        heap = self._riders.get(kind, [])
        while heap and heap[0][2].version != heap[0][3]:
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def _give(self, offer: _Offer) -> None:
        line = offer.line
        line.running += 1
        line.clock = max(line.clock, offer.start)
        line.finished[offer.model_id] = offer.start + offer.cost
        self._drop(offer)
        self._announce(line)

    def _drop(self, offer: _Offer) -> None:
        del self._offers[offer.model_id]
        offer.gone = True
        if offer.line.first is offer:
            offer.line.first = None

    # --- turns --------------------------------------------------------------------------------------------------------

    def _settle(self, line: _Line) -> None:
        """See to it that a line with offers has a first one; while some of its work runs, a better one may come."""
        if line.first is not None or line.running > 0:
            return
        tops = [line.waiting[kind][0] for kind in line.waiting if line.top(kind) is not None]
        if not tops:
            return
        line.first = min(tops)[2]
        order = next(self._order)
        if line.account <= self._time:
            heapq.heappush(self._eligible, (line.account + line.first.cost, order, line.first))
        else:
            heapq.heappush(self._ahead, (line.account, order, line.first))

    def _admit(self) -> None:
        """Make eligible whoever is no longer ahead."""
        while (place := _peek(self._ahead)) and place[0] <= self._time:
            account, order, offer = heapq.heappop(self._ahead)
            heapq.heappush(self._eligible, (account + offer.cost, order, offer))

    def _announce(self, line: _Line) -> None:
        """Give a line its places among those that ride along; the ones that it had are void."""
        line.version += 1
        for kind in line.waiting:
            top = line.top(kind)
            if top is not None and kind is not None:
                heap = self._riders.setdefault(kind, [])
                heapq.heappush(heap, (line.account + top.cost, next(self._order), line, line.version))
                if len(heap) > 64 + 4 * len(self._lines):
                    heap[:] = [ride for ride in heap if ride[2].version == ride[3]]
                    heapq.heapify(heap)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _advance(self, time: float) -> None:
        self._time = time
        while self._leaving and self._leaving[0][0] <= self._time:
            self._deactivate(heapq.heappop(self._leaving)[2])

    def _rest(self, line: _Line) -> None:
        line.busy -= 1
        if line.busy == 0:
            if line.account > self._time:
                heapq.heappush(self._leaving, (line.account, next(self._order), line, line.version))
            else:
                self._deactivate(line)

    def _deactivate(self, line: _Line) -> None:
        if line.active and line.busy == 0 and line.account <= self._time:
            line.active = False
            self._num_active -= 1
            if not line.finished:
                del self._lines[line.owner]


def _peek(heap: list[_Place]) -> _Place | None:
    """The smallest place of an offer that is still the first of its line."""
    while heap and heap[0][2].line.first is not heap[0][2]:
        heapq.heappop(heap)
    return heap[0] if heap else None
