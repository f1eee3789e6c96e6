from __future__ import annotations

import pytest

from tinker_core.errors import SkippedSequenceError, UnknownModelError
from tinker_core.scheduler import QueuedRequest, Scheduler, SkippedGap, Work
from tinker_core.types import RequestType

CREATE, PASS, STEP, SAVE = (
    RequestType.CREATE_MODEL,
    RequestType.FORWARD_BACKWARD,
    RequestType.OPTIM_STEP,
    RequestType.SAVE_WEIGHTS,
)


def request(model: str, seq_id: int, kind: RequestType = PASS, tokens: int = 10) -> QueuedRequest:
    return QueuedRequest(
        request_id=f"{model}{seq_id}", request_type=kind, model_id=model, seq_id=seq_id, num_tokens=tokens
    )


def scheduler_with(*models: str, budget: int = 100, gap: float = 60.0) -> Scheduler:
    scheduler = Scheduler(token_budget=budget, gap_seconds=gap)
    for model in models:
        scheduler.add_model(model)
        scheduler.submit(request(model, 0, CREATE), 0.0)
    for _ in models:
        finish(scheduler, 0.0)
    return scheduler


def finish(scheduler: Scheduler, now: float) -> str:
    """Run the next work to its end; its kind and requests as a line of a transcript."""
    work = scheduler.next(now)
    if work is None:
        return "-"
    scheduler.finish(work, now)
    return line(work)


def line(work: Work) -> str:
    return f"{work.kind.value}: {' '.join(r.request_id for r in work.requests)}"


def test_a_transcript_with_chunks_out_of_order_an_abandoned_number_and_a_gap_that_times_out() -> None:
    scheduler = scheduler_with("a", "b", "c")
    transcript = []

    # The parts of one call arrive as 2, 3, 1: nothing runs before 1 is there.
    scheduler.submit(request("a", 2), 1.0)
    scheduler.submit(request("a", 3), 1.0)
    transcript.append(finish(scheduler, 1.0))
    scheduler.submit(request("a", 1), 1.0)
    transcript += [finish(scheduler, 1.0) for _ in range(4)]

    # Number 1 of b was refused on the way; its optimizer step, number 2, proves that it will not come.
    scheduler.submit(request("b", 2, STEP), 2.0)
    transcript.append(finish(scheduler, 2.0))

    # Number 1 of c is lost, and only passes follow: they wait until the deadline.
    scheduler.submit(request("c", 2), 3.0)
    transcript.append(finish(scheduler, 3.0))
    assert scheduler.deadline() == 63.0
    transcript.append(finish(scheduler, 62.9))
    transcript.append(finish(scheduler, 63.0))

    assert transcript == ["-", "pass: a1", "pass: a2", "pass: a3", "-", "step: b2", "-", "-", "pass: c2"]
    assert scheduler.take_skipped() == (
        SkippedGap(model_id="b", first_seq_id=1, last_seq_id=1, timed_out=False),
        SkippedGap(model_id="c", first_seq_id=1, last_seq_id=1, timed_out=True),
    )
    assert scheduler.take_skipped() == ()
    assert scheduler.deadline() is None


def test_a_number_that_was_passed_over_is_refused_when_it_arrives_after_all() -> None:
    scheduler = scheduler_with("a")
    scheduler.submit(request("a", 2, STEP), 0.0)
    finish(scheduler, 0.0)
    with pytest.raises(SkippedSequenceError, match="seq_id=1"):
        scheduler.submit(request("a", 1), 0.0)


def test_a_step_does_not_overtake_an_earlier_pass_that_is_there() -> None:
    scheduler = scheduler_with("a")
    scheduler.submit(request("a", 2, STEP), 0.0)
    scheduler.submit(request("a", 3), 0.0)
    assert [finish(scheduler, 0.0) for _ in range(3)] == ["step: a2", "pass: a3", "-"]


def test_an_optimizer_step_is_a_barrier_for_its_own_model_only() -> None:
    scheduler = scheduler_with("a", "b")
    for r in (request("a", 1), request("a", 2, STEP), request("a", 3), request("b", 1), request("b", 2)):
        scheduler.submit(r, 0.0)
    transcript = [finish(scheduler, 0.0) for _ in range(4)]
    assert transcript == ["pass: a1 b1", "step: a2", "pass: b2 a3", "-"]


def test_passes_of_different_models_are_packed_up_to_the_budget_and_models_take_turns() -> None:
    scheduler = scheduler_with("a", "b", "c", budget=25)
    for seq_id in (1, 2):
        for model in "abc":
            scheduler.submit(request(model, seq_id), 0.0)
    assert [finish(scheduler, 0.0) for _ in range(3)] == ["pass: a1 b1", "pass: c1 a2", "pass: b2 c2"]


def test_a_request_larger_than_the_budget_runs_alone_and_is_not_starved() -> None:
    scheduler = scheduler_with("a", "b", "c", budget=25)
    scheduler.submit(request("a", 1, tokens=5), 0.0)
    scheduler.submit(request("b", 1, tokens=1000), 0.0)
    scheduler.submit(request("c", 1, tokens=5), 0.0)
    assert [finish(scheduler, 0.0) for _ in range(2)] == ["pass: a1 c1", "pass: b1"]


def test_steps_of_several_models_run_together_and_a_save_runs_alone() -> None:
    scheduler = scheduler_with("a", "b", "c")
    scheduler.submit(request("a", 1, STEP), 0.0)
    scheduler.submit(request("b", 1, SAVE), 0.0)
    scheduler.submit(request("c", 1, STEP), 0.0)
    assert [finish(scheduler, 0.0) for _ in range(2)] == ["step: a1 c1", "single: b1"]


def test_only_one_piece_of_work_runs_at_a_time() -> None:
    scheduler = scheduler_with("a", "b")
    scheduler.submit(request("a", 1, STEP), 0.0)
    work = scheduler.next(0.0)
    assert work is not None
    scheduler.submit(request("b", 1), 0.0)
    assert scheduler.next(0.0) is None
    assert (scheduler.num_queued(), scheduler.num_running()) == (1, 1)
    scheduler.finish(work, 0.0)
    assert finish(scheduler, 0.0) == "pass: b1"


def test_a_removed_model_gives_back_what_waited_and_takes_nothing_more() -> None:
    scheduler = scheduler_with("a")
    scheduler.submit(request("a", 2), 0.0)
    assert [r.request_id for r in scheduler.remove_model("a")] == ["a2"]
    with pytest.raises(UnknownModelError):
        scheduler.submit(request("a", 3), 0.0)
    assert scheduler.next(0.0) is None
