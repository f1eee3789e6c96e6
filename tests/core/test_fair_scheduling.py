"""Shares and waits, simulated: a thousand tenants, some with hundreds of models, some with more work than ever ends."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable

import attrs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinker_core.fair_shares import LEADS_PER_WORK, FairShares
from tinker_core.scheduler import QueuedRequest, Scheduler, Work, WorkKind
from tinker_core.types import RequestType

BUDGET = 2048
LEAST_COST = BUDGET / LEADS_PER_WORK
PASS, STEP, SAVE = RequestType.FORWARD_BACKWARD, RequestType.OPTIM_STEP, RequestType.SAVE_WEIGHTS


def cost_of(request: QueuedRequest) -> float:
    return max(float(request.num_tokens), LEAST_COST)


@attrs.define
class Wait:
    """A request that has not begun to run, and what began since it came."""

    leads: float = 0.0
    tokens: int = 0
    works: int = 0


@attrs.define
class Simulation:
    """Runs works one after another, and checks each against what every model sent."""

    scheduler: Scheduler = attrs.field(factory=lambda: Scheduler(token_budget=BUDGET))
    given: Counter[str] = attrs.field(factory=Counter)
    """Cost of what ran, by owner."""
    watched: dict[str, Wait] = attrs.field(factory=dict)
    waits: dict[str, Wait] = attrs.field(factory=dict)
    works: int = 0
    _owners: dict[str, str] = attrs.field(factory=dict)
    _sent: Counter[str] = attrs.field(factory=Counter)
    _ran: Counter[str] = attrs.field(factory=Counter)

    def add_model(self, owner: str, model_id: str) -> None:
        self._owners[model_id] = owner
        self.scheduler.add_model(model_id, owner=owner, next_seq_id=1)

    def send(self, model_id: str, kind: RequestType, tokens: int = 0, *, watch: bool = False) -> str:
        self._sent[model_id] += 1
        seq_id = self._sent[model_id]
        request = QueuedRequest(
            request_id=f"{model_id}/{seq_id}", request_type=kind, model_id=model_id, seq_id=seq_id, num_tokens=tokens
        )
        self.scheduler.submit(request, 0.0)
        if watch:
            self.watched[request.request_id] = Wait()
        return request.request_id

    def begin(self) -> Work | None:
        work = self.scheduler.next(0.0)
        if work is None:
            return None
        self.works += 1
        self._check(work)
        for request in work.requests:
            self.given[self._owners[request.model_id]] += int(cost_of(request))
            if request.request_id in self.watched:
                self.waits[request.request_id] = self.watched.pop(request.request_id)
        tokens = sum(request.num_tokens for request in work.requests)
        for wait in self.watched.values():
            wait.leads += cost_of(work.requests[0])
            wait.tokens += tokens
            wait.works += 1
        return work

    def run(self, works: int, finished: Callable[[QueuedRequest], None] | None = None) -> None:
        for _ in range(works):
            work = self.begin()
            if work is None:
                return
            self.scheduler.finish(work, 0.0)
            for request in work.requests:
                if finished is not None:
                    finished(request)

    def _check(self, work: Work) -> None:
        """Order within each model, one kind, one request of a model, and the budget."""
        assert {request.kind for request in work.requests} == {work.kind}
        assert len({request.model_id for request in work.requests}) == len(work.requests)
        if len(work.requests) > 1:
            assert work.kind is not WorkKind.SINGLE
            assert sum(request.num_tokens for request in work.requests) <= BUDGET
        for request in work.requests:
            self._ran[request.model_id] += 1
            assert request.seq_id == self._ran[request.model_id], "out of order"


def test_a_thousand_tenants_with_everything_at_once() -> None:
    """Every watched request is the only one of its tenant, who asks for less than a fair share."""
    rng = random.Random(4)
    simulation = Simulation()
    heavy = [f"heavy{i}" for i in range(100)]  # ten models each, endless requests of ten works
    hoards = [f"hoard{i}" for i in range(10)]  # three hundred models each, with many small requests
    crowd = [f"crowd{i}" for i in range(690)]  # one model each, always with something to do
    light = [f"light{i}" for i in range(200)]
    for owners, models in ((heavy, 10), (hoards, 300), (crowd, 1), (light, 1)):
        for owner in owners:
            for number in range(models):
                simulation.add_model(owner, f"{owner}:{number}")
    for owner in heavy:
        for number in range(10):
            simulation.send(f"{owner}:{number}", PASS, 10 * BUDGET)
    for owner in hoards:
        for number in range(300):
            for _ in range(5):
                simulation.send(
                    f"{owner}:{number}", *rng.choice([(PASS, rng.randint(1, BUDGET)), (STEP, 0), (SAVE, 0)])
                )
    for owner in crowd:
        simulation.send(f"{owner}:0", PASS, rng.randint(1, BUDGET))

    def again(request: QueuedRequest) -> None:
        owner = request.model_id.partition(":")[0]
        if owner.startswith("heavy"):
            simulation.send(request.model_id, PASS, rng.randint(1, 10) * BUDGET)
        elif not owner.startswith("light"):
            simulation.send(request.model_id, *rng.choice([(PASS, rng.randint(1, BUDGET)), (STEP, 0)]))

    for owner in light:
        simulation.run(rng.randint(1, 40), again)
        running = simulation.begin()
        assert running is not None
        simulation.send(f"{owner}:0", *rng.choice([(PASS, 100), (STEP, 0), (SAVE, 0)]), watch=True)
        simulation.scheduler.finish(running, 0.0)
        for request in running.requests:
            again(request)
    simulation.run(2000, again)
    assert len(simulation.waits) == len(light), "somebody is still waiting"
    bound = 1000 * LEAST_COST + 10 * BUDGET
    assert max(wait.leads for wait in simulation.waits.values()) <= bound
    assert max(wait.tokens for wait in simulation.waits.values()) <= LEADS_PER_WORK * bound
    # What is proved holds in the worst case. Here nobody waits for more than a few works, least of all for large ones.
    assert max(wait.works for wait in simulation.waits.values()) <= 24


def test_a_small_request_waits_for_no_large_one_that_does_not_run_already() -> None:
    simulation = Simulation()
    for number in range(999):
        simulation.add_model(f"heavy{number}", f"heavy{number}")
        for _ in range(3):
            simulation.send(f"heavy{number}", PASS, 50 * BUDGET)
    simulation.add_model("light", "light")
    for _ in range(20):
        running = simulation.begin()
        assert running is not None
        request = simulation.send("light", PASS, 100, watch=True)
        simulation.scheduler.finish(running, 0.0)
        simulation.run(1)
        assert simulation.waits[request].works == 0
        simulation.run(20)


def given_to(sizes: dict[str, tuple[int, Callable[[], int]]], works: int) -> Counter[str]:
    """What owners are given who always have more requests of each of their models waiting."""
    simulation = Simulation()
    for owner, (models, size) in sizes.items():
        for index in range(models):
            simulation.add_model(owner, f"{owner}:{index}")
            for _ in range(2):
                simulation.send(f"{owner}:{index}", PASS, size())

    def again(request: QueuedRequest) -> None:
        simulation.send(request.model_id, PASS, sizes[request.model_id.partition(":")[0]][1]())

    simulation.run(works // 10, again)
    simulation.given.clear()
    simulation.run(works, again)
    return simulation.given


def test_shares_are_equal_whatever_owners_ask_for_and_however_many_models_they_have() -> None:
    rng = random.Random(5)
    given = given_to(
        {
            "half": (1, lambda: BUDGET // 2 + 1),
            "full": (300, lambda: rng.randint(BUDGET // 2 + 1, BUDGET)),
            "large": (2, lambda: 20 * BUDGET),
            "mixed": (40, lambda: rng.choice([BUDGET - 1, 3 * BUDGET, 40 * BUDGET])),
        },
        works=5_000,
    )
    assert max(given.values()) - min(given.values()) <= 2 * 40 * BUDGET, "two of the largest requests"
    assert min(given.values()) > 2_800_000


def test_what_is_left_of_a_works_room_is_given_away_without_taking_from_anybody() -> None:
    rng = random.Random(6)
    given = given_to(
        {
            "tiny": (10, lambda: 10),
            "small": (5, lambda: rng.randint(1, 600)),
            "medium": (7, lambda: rng.randint(600, 2000)),
            "large": (2, lambda: 20 * BUDGET),
            "mixed": (200, lambda: rng.choice([10, 5000, 300, 40_000])),
        },
        works=5_000,
    )
    assert all(each > 0.95 * given["large"] for each in given.values()), given
    even = given_to({f"owner{n}": (1 + n % 5, lambda: rng.randint(1, 300)) for n in range(50)}, works=2_000)
    assert max(even.values()) < 1.05 * min(even.values()), "among equals it is shared as well"


def test_the_models_of_one_owner_get_equal_shares_too() -> None:
    simulation = Simulation()
    tokens = {"a": 300, "b": 2000, "c": 20_000}
    given: Counter[str] = Counter()
    for model_id, size in tokens.items():
        simulation.add_model("ann", model_id)
        for _ in range(2):
            simulation.send(model_id, PASS, size)

    def again(request: QueuedRequest) -> None:
        given[request.model_id] += request.num_tokens
        simulation.send(request.model_id, PASS, tokens[request.model_id])

    simulation.run(5000, again)
    assert max(given.values()) < 1.05 * min(given.values())


def test_a_large_request_gets_its_turn_among_a_thousand_owners_of_small_ones() -> None:
    simulation = Simulation()
    for number in range(999):
        simulation.add_model(f"small{number}", f"small{number}")
        simulation.send(f"small{number}", PASS, 250)
    simulation.add_model("large", "large")

    def again(request: QueuedRequest) -> None:
        simulation.send(request.model_id, PASS, 250)

    simulation.run(10, again)
    request = simulation.send("large", PASS, 4 * BUDGET, watch=True)
    simulation.run(5000, again)
    wait = simulation.waits[request]
    assert wait.leads <= 1000 * 4 * BUDGET + 4 * BUDGET


def test_a_replay_of_thousands_of_requests_lets_others_pass() -> None:
    simulation = Simulation()
    simulation.add_model("replayed", "replayed")
    again = [
        QueuedRequest(
            request_id=f"replayed/{n}", request_type=PASS, model_id="replayed", seq_id=n, num_tokens=BUDGET, proves=True
        )
        for n in range(1, 5001)
    ]
    simulation.scheduler.rewind("replayed", 1, again, 0.0)
    simulation.add_model("light", "light")
    simulation.run(100)
    running = simulation.begin()
    assert running is not None
    request = simulation.send("light", STEP, watch=True)
    simulation.scheduler.finish(running, 0.0)
    simulation.run(1)
    assert simulation.waits[request].works == 0
    assert simulation.scheduler.num_queued() == 5000 - 101


OWNERS, MODELS = 4, 3


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, int, int, bool] | None]:
    """Offers (owner, model, size, is a pass), and works where there is None."""
    offer = st.tuples(
        st.integers(0, OWNERS - 1),
        st.integers(0, MODELS - 1),
        st.sampled_from([1, 20, 50, 99, 100, 400, 1000]),
        st.booleans(),
    )
    return draw(st.lists(st.one_of(st.none(), offer, offer), max_size=80))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories())
def test_no_request_that_is_first_in_line_waits_longer_than_the_bound(
    history: list[tuple[int, int, int, bool] | None],
) -> None:
    """The bound as the module states it, for every request of an owner that has nothing else waiting or running."""
    shares = FairShares(100)
    up: dict[str, tuple[str, float, bool]] = {}
    running: list[str] = []
    waiting: dict[str, tuple[float, float, float]] = {}
    """Leads that may still run before it as of its arrival, its cost and what is ahead; what led since."""
    largest = 0.0
    most_active = OWNERS
    busy: defaultdict[str, int] = defaultdict(int)

    def work() -> None:
        nonlocal running
        for model in running:
            owner = model.partition(":")[0]
            busy[owner] -= 1
            shares.done(owner)
        taken = shares.take()
        assert bool(taken) == bool(up)
        if taken:
            assert len({up[model][2] for model in taken}) == 1
            lead_cost = shares.cost_of(up[taken[0]][1])
            size = sum(up[model][1] for model in taken)
            assert size <= LEADS_PER_WORK * lead_cost
            for model in taken:
                bound = waiting.pop(model, None)
                assert bound is None or bound[2] <= most_active * (bound[0] + bound[1]) + largest + 1e-6
            for model, (cost, ahead, led) in waiting.items():
                waiting[model] = (cost, ahead, led + lead_cost)
        running = taken
        for model in taken:
            del up[model]

    for event in history:
        if event is None:
            work()
            continue
        owner, model = f"{event[0]}", f"{event[0]}:{event[1]}"
        if model in up or model in running:
            continue
        size = float(event[2])
        alone_in_line = busy[owner] == 0
        shares.offer(model, owner=owner, kind=event[3], size=size)
        busy[owner] += 1
        up[model] = (owner, size, event[3])
        largest = max(largest, shares.cost_of(size))
        if alone_in_line:
            waiting[model] = (shares.cost_of(size), shares.ahead(owner), 0.0)
    while up or running:
        work()
    assert not waiting
    for _ in range(3):
        assert shares.take() == []
