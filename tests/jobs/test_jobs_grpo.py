"""The parts of a GRPO job, and whole jobs against a real server with rollout workers in this process instead of Ray."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.conftest import JobServer
from tests.jobs.grpo_jobs import grpo_spec, make_task, trained_positions
from tests.jobs.rl_jobs import final_metrics, messages, of_type
from tinker_core.rewards import RewardError
from tinker_jobs.errors import CancelledJobError, JobFailedError, JobRequestError
from tinker_jobs.grpo.advantages import Baseline, group_advantages, split_baseline
from tinker_jobs.grpo.buffer import ExperienceBuffer
from tinker_jobs.grpo.groups import Asked, PromptGroup, PublishedPolicy
from tinker_jobs.grpo.plan import PromptPlan
from tinker_jobs.grpo.pool import MAX_ATTEMPTS, RolloutWorkerLostError, WorkerPool
from tinker_jobs.grpo.settings import GRPOSettings
from tinker_jobs.grpo.trainer import prepare, train
from tinker_jobs.grpo.worker import RolloutWorker, WorkerSpec
from tinker_jobs.protocol import EventType, JobEvent, JobSpec
from tinker_jobs.requests import RayGRPOJobConfig
from tinker_jobs.rl.prompt_rows import Prompt
from tinker_jobs.rows import PromptRow
from tinker_jobs.worker.run import JobRun

QUESTIONS = [{"prompt": f"What is {a} + 1?"} for a in range(6)]
DIGITS = {"name": "digits", "params": {}}
QUICK = {"num_rollouts": 4, "batch_size": 2, "learning_rate": 0.02, "reward_recipe": DIGITS}
TASK = make_task(max_new_tokens=4, lora_rank=4)


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_are_normalised_within_their_group() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0], Baseline.GROUP_MEAN) == [1.0, -1.0, -1.0, 1.0]


def test_leave_one_out_compares_a_reward_with_the_others() -> None:
    # 1 - 0 and 0 - 1/3, over the deviation of the group, sqrt(3)/4.
    found = group_advantages([1.0, 0.0, 0.0, 0.0], Baseline.LEAVE_ONE_OUT)
    deviation = 3**0.5 / 4
    assert found == pytest.approx([1 / deviation, *[-1 / 3 / deviation] * 3])


@pytest.mark.parametrize("baseline", list(Baseline))
def test_equal_rewards_teach_nothing(baseline: Baseline) -> None:
    # The mean of these is not exactly 0.1.
    assert group_advantages([0.1] * 3, baseline) == [0.0] * 3


def test_a_recipe_does_not_see_the_baseline_and_an_unknown_one_is_refused() -> None:
    assert split_baseline({"needle": "=", "baseline": "leave_one_out"}) == (Baseline.LEAVE_ONE_OUT, {"needle": "="})
    with pytest.raises(RewardError, match="must be one of group_mean, leave_one_out on backend ray, got 'none'"):
        split_baseline({"baseline": "none"})


# --- settings ---------------------------------------------------------------------------------------------------------


def settings_of(task: Any = TASK, **config: Any) -> GRPOSettings:
    ref = {"name": "prompts", "version": "1"}
    return GRPOSettings.of(RayGRPOJobConfig(task_ref="task", prompt_dataset_ref=ref, **config), task)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({}, (8, 4)),
        ({"batch_size": 3}, (3, 4)),
        ({"num_rollouts": 12}, (3, 4)),
        ({"num_rollouts": 3}, (1, 3)),
        ({"num_rollouts": 12, "batch_size": 2}, (2, 6)),
    ],
)
def test_prompts_and_completions_of_a_step_follow_from_each_other(
    config: dict[str, int], sizes: tuple[int, int]
) -> None:
    found = settings_of(**config)
    assert (found.num_prompts, found.group_size) == sizes


@pytest.mark.parametrize(
    ("config", "grpo", "field", "message"),
    [
        ({"num_rollouts": 6, "batch_size": 4}, {}, "num_rollouts", "must be a multiple of batch_size"),
        ({"num_rollouts": 4, "batch_size": 4}, {}, "num_rollouts", "at least twice that"),
        ({"num_rollouts": 1}, {}, "num_rollouts", "at least twice that"),
        ({"batch_size": 4, "buffer_size": 3}, {}, "buffer_size", "at least batch_size"),
        ({"max_turns": 2}, {}, "max_turns", "must be 1 on backend ray"),
        ({"max_episode_steps": 2}, {}, "max_episode_steps", "must be 1 on backend ray"),
        ({"reward_recipe": {"name": "task_env_agent_v1"}}, {}, "reward_recipe", "acts in an environment"),
        ({}, {"steps": 3}, "task_ref", "grpo.steps is unknown"),
        ({}, {"epochs": 0}, "task_ref", "grpo.epochs must be an integer of at least 1, got 0"),
        ({}, {"temperature": 0}, "task_ref", "grpo.temperature must be a number above 0"),
    ],
)
def test_what_no_job_could_honour_is_refused_by_field(
    config: dict[str, Any], grpo: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(JobRequestError) as refused:
        settings_of(make_task(**grpo), **config)
    (mistake,) = refused.value.mistakes
    assert mistake.loc[2] == field
    assert message in mistake.msg


def test_completions_leave_half_of_a_small_context_to_the_prompt() -> None:
    open_choice = settings_of(make_task())
    assert [open_choice.max_new_tokens_in(context) for context in (None, 4096, 512)] == [512, 512, 256]
    assert settings_of(make_task(max_new_tokens=500)).max_new_tokens_in(512) == 500


# --- the plan ---------------------------------------------------------------------------------------------------------


def make_prompts(count: int) -> list[Prompt]:
    row = PromptRow(messages=())
    return [Prompt(where=f"row {number}", row=row, tokens=(number,)) for number in range(count)]


def make_plan(state: dict[str, Any] | None = None) -> PromptPlan:
    return PromptPlan(make_prompts(7), num_prompts=3, epochs=2, state=state)


def test_every_prompt_is_asked_once_per_epoch_in_an_order_of_its_own() -> None:
    plan = make_plan()
    first, second = plan.take(7), plan.take()
    rows = [[asked.prompt.where for asked in epoch] for epoch in (first, second)]
    assert rows[0] != rows[1]
    assert sorted(rows[0]) == sorted(rows[1]) == [f"row {number}" for number in range(7)]
    assert [plan.size_of(step) for step in range(1, plan.num_steps + 1)] == [3, 3, 3, 3, 2]


def test_a_resumed_plan_asks_what_was_overtaken_and_nothing_twice() -> None:
    plan = make_plan()
    asked = plan.take()
    plan.finish(asked[position] for position in (0, 2, 5))
    assert plan.state == {"next_position": 6, "left_behind": [1, 3, 4]}
    resumed = make_plan(plan.state)
    left = resumed.take()
    assert [one.position for one in left] == [1, 3, 4, *range(6, 14)]
    assert all(one == asked[one.position] for one in left)
    resumed.finish(left)
    assert resumed.state == {"next_position": 14, "left_behind": []}


# --- the buffer -------------------------------------------------------------------------------------------------------


def test_makers_wait_until_the_learner_has_taken_items() -> None:
    async def run() -> None:
        buffer: ExperienceBuffer[int] = ExperienceBuffer(2)
        await buffer.reserve()
        await buffer.reserve()
        third = asyncio.ensure_future(buffer.reserve())
        buffer.put(1)
        await asyncio.sleep(0)
        assert not third.done()  # what is ready takes its place until it is taken
        taken = asyncio.ensure_future(buffer.take(2))
        await asyncio.sleep(0)
        assert not taken.done()
        buffer.put(2)
        assert await taken == [1, 2]
        await third
        assert buffer.reserved == 1

    asyncio.run(run())


# --- the pool ---------------------------------------------------------------------------------------------------------


class Script:
    """Workers of a pool by the order in which they were made: what becomes of what they are given."""

    def __init__(self, *fates: str, last: str = "works") -> None:
        self._fates = fates
        self._last = last
        self.made: list[ScriptedWorker] = []
        self.asked: list[tuple[str, int]] = []

    def spawn(self) -> ScriptedWorker:
        number = len(self.made)
        fate = self._fates[number] if number < len(self._fates) else self._last
        worker = ScriptedWorker(f"#{number}", fate, self)
        self.made.append(worker)
        return worker


class ScriptedWorker:
    def __init__(self, name: str, fate: str, script: Script) -> None:
        self.name = name
        self._fate = fate
        self._script = script
        self.stopped = False

    async def start(self) -> None:
        if self._fate == "never starts":
            await asyncio.Event().wait()
        if self._fate == "dies at start":
            raise RolloutWorkerLostError("no memory")

    async def roll_out(self, asked: Asked, policy: PublishedPolicy) -> PromptGroup:
        self._script.asked.append((self.name, asked.position))
        await asyncio.sleep(0)
        if self._fate == "answers while it dies" and asked.position > 0:
            await asyncio.sleep(0)
        elif self._fate in ("dies of its first prompt", "answers while it dies"):
            raise RolloutWorkerLostError("killed")
        if self._fate == "refuses":
            raise JobFailedError("row 1: no needle")
        return PromptGroup(asked=asked, version=policy.version, completions=())

    def stop(self) -> None:
        self.stopped = True


def ask(script: Script, count: int, num_workers: int = 2, start_seconds: float = 60.0) -> tuple[list[int], list[str]]:
    """The positions that a pool answers, and its log; raises what the pool fails with."""
    log: list[str] = []
    policy = PublishedPolicy(version=0, sampler=b"")

    async def run() -> list[int]:
        async with asyncio.TaskGroup() as tasks:
            pool = WorkerPool(
                script.spawn,
                num_workers=num_workers,
                prompts_per_worker=2,
                tasks=tasks,
                log=lambda message, **_: log.append(message),
                start_seconds=start_seconds,
            )
            try:
                pool.start()
                asked = [Asked(position=n, prompt=prompt) for n, prompt in enumerate(make_prompts(count))]
                groups = await asyncio.gather(*(pool.roll_out(one, lambda: policy) for one in asked))
            finally:
                pool.close()
        return [group.asked.position for group in groups]

    try:
        return asyncio.run(run()), log
    except ExceptionGroup as group:
        raise group.exceptions[0] from group


def test_the_prompts_of_a_lost_worker_go_to_others_and_count_once() -> None:
    script = Script("dies of its first prompt")
    positions, log = ask(script, 8)
    assert positions == list(range(8))
    lost = {position for name, position in script.asked if name == "#0"}
    assert len(lost) == 2
    assert Counter(position for _, position in script.asked) == {n: 2 if n in lost else 1 for n in range(8)}
    assert any("#0 was lost (killed); its 2 unfinished prompts go to others" in line for line in log)
    assert len(script.made) == 3
    assert all(worker.stopped for worker in script.made)


def test_the_last_answer_of_a_worker_that_is_lost_counts() -> None:
    script = Script("answers while it dies")
    positions, _ = ask(script, 2, num_workers=1)
    assert positions == [0, 1]
    assert script.asked == [("#0", 0), ("#0", 1), ("#1", 0)]


def test_a_replacement_that_finds_no_room_holds_up_nobody() -> None:
    script = Script("dies of its first prompt", "works", last="never starts")
    assert ask(script, 8)[0] == list(range(8))


def test_a_pool_whose_only_worker_dies_goes_on_with_the_next() -> None:
    script = Script("dies of its first prompt", "dies at start", "dies of its first prompt")
    assert ask(script, 3, num_workers=1)[0] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fate", "count", "message"),
    [
        ("never starts", 4, "no rollout worker has started for 0.05 s"),
        ("dies at start", 4, "7 rollout workers died in a row; the last one: no memory"),
        ("dies of its first prompt", 1, f"row 0: {MAX_ATTEMPTS} rollout workers died while answering it"),
        ("refuses", 4, "row 1: no needle"),
    ],
)
def test_a_pool_that_cannot_work_fails_with_the_reason(fate: str, count: int, message: str) -> None:
    with pytest.raises(JobFailedError, match=message):
        ask(Script(last=fate), count, start_seconds=0.05 if fate == "never starts" else 60.0)


# --- whole jobs, without Ray ------------------------------------------------------------------------------------------


class LocalWorker:
    """A real rollout worker in this process, which is lost at its ``lost_at``-th prompt."""

    def __init__(self, spec: WorkerSpec, lost_at: int | None) -> None:
        self.name = "local"
        self._worker = RolloutWorker(spec)
        self._left = lost_at

    async def start(self) -> None:
        await self._worker.start()

    async def roll_out(self, asked: Asked, policy: PublishedPolicy) -> PromptGroup:
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                raise RolloutWorkerLostError("killed")
        return await self._worker.roll_out(asked, policy)

    def stop(self) -> None:
        """A worker in this process ends with what it does."""


def run_job(
    spec: JobSpec, notice: Callable[[JobEvent], None] = lambda _: None, cancelled: threading.Event | None = None
) -> list[JobEvent]:
    """The events of a job whose first worker is lost at its second prompt."""
    events: list[JobEvent] = []

    def send(event: JobEvent) -> None:
        events.append(event)
        notice(event)

    losses: Iterator[int | None] = iter([2])
    run = JobRun(spec, send, cancelled or threading.Event())
    with run.service:
        work = prepare(run)
        train(run, work, lambda: LocalWorker(work.worker_spec, next(losses, None)))
    return events


def test_a_job_that_loses_a_worker_loses_no_step_and_no_prompt(job_server: JobServer, tmp_path: Path) -> None:
    config = {**QUICK, "checkpoint_interval": 2}
    events = run_job(grpo_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, config, TASK))
    metrics = final_metrics(events)
    assert metrics["steps"] == [1, 2, 3]
    assert trained_positions(events) == list(range(6))
    assert metrics["train/num_rollouts"] == 12
    assert metrics["train/rollout_workers_lost"] == 1
    assert any("was lost (killed)" in line for line in messages(events, "warning"))
    saved = of_type(events, EventType.CHECKPOINT_SAVED)
    assert [event.message for event in saved] == ["saved checkpoint-1-step2 after step 2", "saved final after step 3"]
    (end,) = of_type(events, EventType.TRAINING_END)
    assert end.artifacts["execution_mode"] == "async"
    assert end.artifacts["task"] == "task@1.0.0"


def test_a_resumed_job_does_the_steps_that_are_left(job_server: JobServer, tmp_path: Path) -> None:
    spec = grpo_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, {**QUICK, "checkpoint_interval": 2}, TASK)
    reported = {"steps": [1, 2], "train/reward": [0.25, 0.5]}
    stop = threading.Event()

    def stop_after_step_2(event: JobEvent) -> None:
        if event.event_type is EventType.CHECKPOINT_SAVED:
            stop.set()

    first: list[JobEvent] = []
    with pytest.raises(CancelledJobError):
        run_job(spec, lambda event: (first.append(event), stop_after_step_2(event)), stop)  # type: ignore[func-returns-value]
    (saved,) = of_type(first, EventType.CHECKPOINT_SAVED)
    fields = {"resume": saved.resume, "metrics": first_metrics(first) | reported, "artifacts": saved.artifacts}
    again = grpo_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, QUICK, TASK, **fields)
    events = run_job(again)
    assert sorted(trained_positions(first) + trained_positions(events)) == list(range(6))
    assert final_metrics(events)["steps"] == [1, 2, 3]
    assert final_metrics(events)["train/reward"][:2] == [0.25, 0.5]


def first_metrics(events: list[JobEvent]) -> dict[str, Any]:
    """The series of a job's steps, put together as the service does."""
    series: dict[str, Any] = {}
    for event in of_type(events, EventType.STEP_COMPLETE):
        for name, values in event.metrics.items():
            series.setdefault(name, []).extend(values)
    return series


def test_a_recipe_that_cannot_judge_ends_the_job_and_names_the_row(job_server: JobServer, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "divisor": "1"}, {"prompt": "b", "divisor": "0"}]
    config = {**QUICK, "reward_recipe": {"name": "divide", "params": {}}}
    spec = grpo_spec(job_server.url, job_server.model, tmp_path, rows, config, TASK)
    with pytest.raises(JobFailedError, match=r"prompts@1.0.0 row 2: divide failed: ZeroDivisionError"):
        run_job(spec)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", list(Baseline))
@pytest.mark.parametrize("mode", ["async", "colocated", "distributed"])
def test_every_mode_learns_with_every_baseline(
    job_server: JobServer, tmp_path: Path, mode: str, baseline: Baseline
) -> None:
    recipe = {"name": "digits", "params": {"baseline": baseline.value}}
    config = {**QUICK, "num_rollouts": 32, "batch_size": 4, "execution_mode": mode, "reward_recipe": recipe}
    task = make_task(max_new_tokens=6, lora_rank=8, epochs=16)
    events = run_job(grpo_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, config, task))
    metrics = final_metrics(events)
    assert metrics["train/reward"][0] < 0.3
    assert max(metrics["train/reward"]) >= 0.9
    assert (max(metrics["train/staleness"]) > 0) == (mode == "async")
    assert trained_positions(events) == list(range(96))
