"""Drawing rollouts while the model trains: how old they get, in which order, and what is reported of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import tinker
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs import digit_recipe
from tests.jobs.conftest import JobServer
from tests.jobs.rl_jobs import final_metrics, of_type, rl_spec, train, write_dataset
from tinker_jobs.errors import CancelledJobError, JobFailedError
from tinker_jobs.protocol import EventType, JobEvent
from tinker_jobs.rl.rollouts import Policy, Rollout, RolloutGroup
from tinker_jobs.rl.schedule import Plan, Schedule

QUESTIONS = [{"prompt": f"What is {a} + 1?"} for a in range(6)]
DIGITS = {"name": "digits", "params": {}}
QUICK = {"num_rollouts": 4, "batch_size": 2, "max_new_tokens": 4, "lora_rank": 4, "reward_recipe": DIGITS}


# --- the schedule by itself -------------------------------------------------------------------------------------------


@attrs.define
class Source:
    """Rollouts that take ``delays[step]`` turns of the event loop."""

    delays: Mapping[int, int] = attrs.field(factory=dict)
    began: list[tuple[int, int]] = attrs.field(factory=list)
    """(step, version of the policy)."""
    ended: list[int] = attrs.field(factory=list)

    async def collect(self, step: int, policy: Policy) -> tuple[Rollout, ...]:
        self.began.append((step, policy.version))
        for _ in range(self.delays.get(step, 0)):
            await asyncio.sleep(0)
        self.ended.append(step)
        return (Rollout(turns=(), reward=float(step)),)

    async def evaluate(self, policy: Policy) -> Mapping[str, float]:
        await asyncio.sleep(0)
        return {"eval/reward": float(policy.version)}


@attrs.define
class Trainer:
    """Takes one optimizer step for each group, and publishes what it has."""

    version: int
    published: list[int] = attrs.field(factory=list)
    evaluations: dict[int, float] = attrs.field(factory=dict)
    trained: list[RolloutGroup] = attrs.field(factory=list)
    max_pending: int = 0

    async def refresh(self, version: int) -> Policy:
        assert version == self.version, "what is published is what was trained"
        self.published.append(version)
        return Policy(sampler=cast(tinker.SamplingClient, None), version=version)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.evaluations[step] = metrics["eval/reward"]

    async def run(self, plan: Plan, source: Any) -> None:
        schedule = Schedule(plan, source, refresh=self.refresh, report=self.report)
        async with aclosing(schedule.groups()) as groups:
            async for group in groups:
                self.max_pending = max(self.max_pending, schedule.num_pending)
                await asyncio.sleep(0)
                self.version = group.step
                self.trained.append(group)


def make_plan(**fields: Any) -> Plan:
    values: dict[str, Any] = {"first_step": 1, "num_steps": 6, "groups_ahead": 0, "weight_sync_interval": 1}
    return Plan(**{**values, "max_staleness": None, **fields})


@settings(max_examples=150, deadline=None)
@given(
    bound=st.integers(1, 5),
    interval=st.integers(1, 8),
    first_step=st.integers(1, 4),
    num_steps=st.integers(1, 14),
    delays=st.dictionaries(st.integers(1, 14), st.integers(0, 30)),
)
def test_no_rollout_is_older_than_the_bound_when_it_is_used(
    bound: int, interval: int, first_step: int, num_steps: int, delays: dict[int, int]
) -> None:
    plan = make_plan(
        first_step=first_step,
        num_steps=num_steps,
        groups_ahead=bound,
        weight_sync_interval=interval,
        max_staleness=bound,
    )
    source, trainer = Source(delays), Trainer(version=first_step - 1)
    asyncio.run(trainer.run(plan, source))
    assert [group.step for group in trainer.trained] == list(range(first_step, num_steps + 1))
    assert all(0 <= group.step - 1 - group.version <= bound for group in trainer.trained)
    assert [group.version for group in trainer.trained] == [version for _, version in source.began]
    assert trainer.max_pending <= bound
    if interval <= bound + 1 and first_step == 1:
        assert trainer.published == list(range(0, num_steps, interval))


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_in_turn_the_policy_is_refreshed_before_every_so_many_steps(interval: int) -> None:
    source, trainer = Source(), Trainer(version=0)
    asyncio.run(trainer.run(make_plan(weight_sync_interval=interval), source))
    assert trainer.published == list(range(0, 6, interval))
    assert source.began == [(step, (step - 1) // interval * interval) for step in range(1, 7)]
    assert trainer.max_pending == 0


def test_the_bound_goes_before_the_interval() -> None:
    source, trainer = Source(), Trainer(version=0)
    asyncio.run(trainer.run(make_plan(weight_sync_interval=6, groups_ahead=1, max_staleness=1), source))
    # Versions 0 and 1 may use what version 0 drew, and so on: without a refreshment step 3 could never begin.
    assert source.began == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (6, 4)]


@pytest.mark.parametrize("groups_ahead", [1, 3])
def test_rollouts_are_drawn_while_the_model_trains(groups_ahead: int) -> None:
    async def main() -> None:
        drawing, trained = asyncio.Event(), asyncio.Event()

        class Waiting(Source):
            async def collect(self, step: int, policy: Policy) -> tuple[Rollout, ...]:
                if step == 2:
                    drawing.set()
                    await trained.wait()
                return await super().collect(step, policy)

        source, trainer = Waiting(), Trainer(version=0)
        plan = make_plan(groups_ahead=groups_ahead, max_staleness=groups_ahead)
        schedule = Schedule(plan, source, refresh=trainer.refresh, report=trainer.report)
        async with aclosing(schedule.groups()) as groups:
            async for group in groups:
                await drawing.wait()  # for ever, if step 2 began only after step 1
                trainer.version = group.step
                trained.set()
        assert trainer.version == 6

    asyncio.run(main())


def test_an_evaluation_is_of_the_policy_that_draws_the_step() -> None:
    source, trainer = Source(), Trainer(version=0)
    plan = make_plan(groups_ahead=2, max_staleness=2, eval_interval=2)
    asyncio.run(trainer.run(plan, source))
    drawn_by = dict(source.began)
    assert trainer.evaluations == {step: drawn_by[step] for step in (2, 4, 6)}


def test_what_is_under_way_ends_with_the_job() -> None:
    async def main() -> None:
        source, trainer = Source({2: 10**9, 3: 10**9}), Trainer(version=0)
        plan = make_plan(groups_ahead=2, max_staleness=2)
        schedule = Schedule(plan, source, refresh=trainer.refresh, report=trainer.report)
        async with aclosing(schedule.groups()) as groups:
            async for _ in groups:
                break
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert source.ended == [1]

    asyncio.run(main())


def test_rollouts_that_fail_end_the_job_at_their_turn() -> None:
    class Failing(Source):
        async def collect(self, step: int, policy: Policy) -> tuple[Rollout, ...]:
            if step == 3:
                raise JobFailedError("row 3")
            return await super().collect(step, policy)

    trainer = Trainer(version=0)
    with pytest.raises(JobFailedError, match="row 3"):
        asyncio.run(trainer.run(make_plan(groups_ahead=4, max_staleness=4), Failing()))
    assert [group.step for group in trainer.trained] == [1, 2]


# --- real jobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "bound", "interval"),
    [("one_step_off_async", 1, 1), ("fully_async", 3, 2), pytest.param("fully_async", 2, 9, marks=pytest.mark.slow)],
)
def test_an_asynchronous_job_keeps_its_bound_and_reports_it(
    job_server: JobServer, tmp_path: Path, mode: str, bound: int, interval: int
) -> None:
    modes = {"execution_mode": mode, "max_steps_off_policy": bound, "weight_sync_interval": interval}
    spec = rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, {**QUICK, **modes, "steps": 5})
    events = train(spec)
    metrics = final_metrics(events)
    steps = [event.metrics for event in of_type(events, EventType.STEP_COMPLETE)]
    staleness = [step["train/staleness"][0] for step in steps]
    assert all(0 <= value <= bound for value in staleness)
    assert metrics["async/max_staleness_observed"] == max(staleness) == bound
    assert metrics["async/max_pending_generation_groups"] == bound
    assert metrics["async/weight_sync_count"] == len(range(0, 5, min(interval, bound + 1)))
    assert metrics["async/generation_step"] == metrics["async/training_step"] == metrics["async/model_version"] == 5
    assert metrics["steps"] == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "bound"), [("one_step_off_async", 1), ("fully_async", 3)])
def test_asynchronous_jobs_learn_too(job_server: JobServer, tmp_path: Path, mode: str, bound: int) -> None:
    modes = {"execution_mode": mode, "max_steps_off_policy": bound}
    large = {"num_rollouts": 32, "batch_size": 4, "max_new_tokens": 6, "learning_rate": 0.02, "lora_rank": 8}
    spec = rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, {**QUICK, **large, **modes, "steps": 16})
    assert final_metrics(train(spec))["train/reward"][-1] > 0.7


def test_a_cancelled_job_goes_on_from_its_checkpoint_when_it_is_resumed(job_server: JobServer, tmp_path: Path) -> None:
    refs = {"eval_dataset": write_dataset(tmp_path, [{"prompt": "eval 1"}, {"prompt": "eval 2"}], "eval")}
    config = {
        **QUICK,
        "execution_mode": "one_step_off_async",
        "max_steps_off_policy": 1,
        "steps": 4,
        "checkpoint_interval": 2,
        "eval_dataset_ref": {"name": "eval", "version": "1.0.0"},
        "eval_interval": 2,
    }
    spec = rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, config, refs)
    cancelled = threading.Event()
    seen: list[JobEvent] = []

    def notice(event: JobEvent) -> None:
        seen.append(event)
        if event.metrics.get("steps") == [3]:
            cancelled.set()

    with pytest.raises(CancelledJobError):
        train(spec, cancelled, notice)
    (saved,) = of_type(seen, EventType.CHECKPOINT_SAVED)
    assert saved.resume is not None
    assert saved.message == "saved checkpoint-1-step2 after step 2"

    digit_recipe.judged_here.clear()
    again = attrs.evolve(spec, attempt=2, resume=saved.resume, metrics=series_of(seen), artifacts=saved.artifacts)
    events = train(again)
    asked = sorted(prompt for prompt in digit_recipe.asked() if not prompt.startswith("eval"))
    rows = [row["prompt"] for row in QUESTIONS]
    # Steps 3 and 4 of 2 prompts each, in turn over 6 rows; twice each.
    assert asked == sorted([*rows[4:], *rows[:2]] * 2)
    metrics = final_metrics(events)
    assert metrics["steps"] == [1, 2, 3, 4]
    assert metrics["train/reward"][:2] == series_of(seen)["train/reward"][:2]
    assert metrics["train/num_rollouts"] == 16
    assert metrics["eval/steps"] == [2, 4]
    assert set(metrics) >= {"eval/reward", "eval/reward_max", "eval/reward_min", "eval/extraction_failed_rate"}
    (end,) = of_type(events, EventType.TRAINING_END)
    (final,) = of_type(events, EventType.CHECKPOINT_SAVED)
    assert [path.rpartition("/")[2] for path in final.artifacts["checkpoints"]] == ["checkpoint-1-step2", "final"]
    assert end.artifacts["execution_mode"] == "one_step_off_async"


def series_of(events: list[JobEvent]) -> dict[str, list[Any]]:
    """What the service keeps of a job's events."""
    series: dict[str, list[Any]] = {}
    for event in events:
        for name, values in event.metrics.items():
            series.setdefault(name, []).extend(values)
    return series


@pytest.mark.slow
def test_evaluations_are_greedy(job_server: JobServer, tmp_path: Path) -> None:
    refs = {"eval_dataset": write_dataset(tmp_path, [{"prompt": "again"}] * 5, "eval")}
    config = {**QUICK, "steps": 1, "temperature": 2.0, "eval_dataset_ref": {"name": "eval", "version": "1.0.0"}}
    config |= {"eval_max_rollouts": 5, "max_new_tokens": 12}
    digit_recipe.judged_here.clear()
    metrics = final_metrics(train(rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, config, refs)))
    assert digit_recipe.asked().count("again") == 5
    assert metrics["eval/steps"] == [1]
    assert metrics["eval/reward_max"] == metrics["eval/reward_min"]
