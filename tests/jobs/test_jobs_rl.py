"""Reinforcement-learning jobs on prompts and recorded trajectories, against a real server."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import attrs
import pytest

from tests.e2e.conftest import run_server
from tests.jobs import digit_recipe
from tests.jobs.conftest import JobServer
from tests.jobs.rl_jobs import REF, final_metrics, messages, of_type, rl_spec, train, write_dataset
from tests.jobs.workers import make_refs, run_worker
from tinker_core.rewards import RewardError
from tinker_jobs.errors import JobFailedError
from tinker_jobs.protocol import EventType, JobEvent
from tinker_jobs.refs import FrozenCapability, FrozenTask
from tinker_jobs.requests import TinkerRLJobConfig
from tinker_jobs.rl.advantages import Baseline, advantages, split_baseline
from tinker_jobs.rl.prompt_source import default_recipe
from tinker_jobs.rl.settings import RLSettings

QUESTIONS = [{"prompt": f"What is {a} + 1?"} for a in range(6)]
DIGITS = {"name": "digits", "params": {}}
QUICK = {"num_rollouts": 4, "batch_size": 2, "max_new_tokens": 4, "lora_rank": 4}
LEARNING = {"num_rollouts": 32, "batch_size": 4, "max_new_tokens": 6, "learning_rate": 0.02, "lora_rank": 8}


@pytest.fixture(autouse=True)
def _judged_nothing() -> None:
    digit_recipe.judged_here.clear()


def sampled(events: list[JobEvent]) -> int:
    return int(final_metrics(events)["train/num_rollouts"])


def test_a_job_learns_what_its_recipe_rewards(job_server: JobServer, tmp_path: Path) -> None:
    config = {**LEARNING, "steps": 7, "reward_recipe": DIGITS}
    events = train(rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, config))
    metrics = final_metrics(events)
    assert metrics["train/reward"][0] < 0.3
    assert metrics["train/reward"][-1] > 0.7
    assert [event.metrics["steps"] for event in of_type(events, EventType.STEP_COMPLETE)] == [[n] for n in range(1, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["importance_sampling", "ppo"])
@pytest.mark.parametrize("baseline", list(Baseline))
def test_both_algorithms_learn_with_every_baseline(
    job_server: JobServer, tmp_path: Path, algorithm: str, baseline: Baseline
) -> None:
    recipe = {"name": "digits", "params": {"baseline": baseline.value}}
    config = {**LEARNING, "steps": 12, "algorithm": algorithm, "reward_recipe": recipe}
    metrics = final_metrics(train(rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, config)))
    assert metrics["train/reward"][-1] > 0.7


@pytest.mark.slow
def test_without_steps_every_row_is_asked_as_often_as_any_other(job_server: JobServer, tmp_path: Path) -> None:
    events = train(rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, {**QUICK, "reward_recipe": DIGITS}))
    assert final_metrics(events)["train/steps"] == 3
    assert Counter(digit_recipe.asked()) == {row["prompt"]: 2 for row in QUESTIONS}


def test_rows_are_asked_in_turn_and_again_from_the_first(job_server: JobServer, tmp_path: Path) -> None:
    config = {**QUICK, "num_rollouts": 5, "batch_size": 4, "steps": 2, "reward_recipe": DIGITS}
    events = train(rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, config))
    assert sampled(events) == 10
    rows, asked = [row["prompt"] for row in QUESTIONS], digit_recipe.asked()
    # 5 completions of 4 prompts: the first prompt of a step has one more.
    assert Counter(asked[:5]) == Counter([rows[0], *rows[:4]])
    assert Counter(asked[5:]) == Counter([rows[4], *rows[4:], *rows[:2]])


@pytest.mark.slow
def test_what_a_job_leaves_open_is_decided_and_reported(job_server: JobServer, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "reward": 0.25}, {"prompt": "b", "reward": 0.75}, {"prompt": "c"}]
    events = train(rl_spec(job_server.url, job_server.model, tmp_path, rows, {"max_new_tokens": 2}))
    (start,) = of_type(events, EventType.TRAINING_START)
    chosen = {"num_rollouts": 8, "num_prompts": 8, "temperature": 1.0, "learning_rate": 1e-4, "num_steps": 1}
    assert chosen.items() <= start.data.items()
    metrics = final_metrics(events)
    # 8 prompts in turn over 3 rows, each worth what its row says; the third says nothing.
    assert metrics["train/reward_mean"] == pytest.approx((3 * 0.25 + 3 * 0.75 + 2 * 0.0) / 8)
    assert (metrics["train/reward_max"], metrics["train/reward_min"]) == (0.75, 0.0)


def test_a_step_without_differences_is_counted_and_changes_nothing(job_server: JobServer, tmp_path: Path) -> None:
    config = {**QUICK, "steps": 2, "reward_recipe": {"name": "row_reward_v1", "params": {"default": 0.1}}}
    events = train(rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, config))
    assert final_metrics(events)["train/steps"] == 2
    assert sum("leaves the weights as they are" in message for message in messages(events, "info")) == 2


@pytest.mark.slow
def test_without_a_baseline_equal_rewards_are_learned_from(job_server: JobServer, tmp_path: Path) -> None:
    recipe = {"name": "row_reward_v1", "params": {"default": 0.1, "baseline": "none"}}
    config = {**QUICK, "steps": 1, "temperature": 0, "reward_recipe": recipe}
    events = train(rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, config))
    assert not [message for message in messages(events, "info") if "leaves the weights" in message]
    assert any("temperature 0" in message for message in messages(events, "warning"))


@pytest.mark.slow
def test_a_completion_ends_at_a_stop_text(job_server: JobServer, tmp_path: Path) -> None:
    config = {**QUICK, "steps": 1, "max_new_tokens": 40, "stop": list("abcdefghijklmnop"), "reward_recipe": DIGITS}
    events = train(rl_spec(job_server.url, job_server.model, tmp_path, QUESTIONS, config))
    assert final_metrics(events)["reward/length"][0] < 40


@pytest.mark.slow
def test_the_policy_sees_capability_task_and_row(job_server: JobServer, tmp_path: Path) -> None:
    refs = {
        "capability": FrozenCapability(name="helper", version="1.0.0", prompt="x" * 300, runtime_digest="sha256:00"),
        "task": FrozenTask(name="t", version="1", content={"instruction": "{{ long }}"}),
    }
    rows = [{"prompt": "fits"}, {"prompt": "does not", "template_context": {"long": "y" * 300}}]
    config = {**QUICK, "steps": 1, "reward_recipe": DIGITS}
    spec = rl_spec(job_server.url, job_server.model, tmp_path, rows, config, refs)
    events = train(spec)
    # One token is one character here, and the context is 512 of them.
    (warning,) = messages(events, "warning")
    assert warning == (
        "1 prompts of prompts@1.0.0; 1 prompts were skipped, because with max_new_tokens=4 they do not fit into the "
        "512 tokens of the model's context"
    )


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (
            [{"prompt": "x" * 600}, {"text": "no prompt"}],
            {},
            "No RL rollouts were generated for training: prompts@1.0.0 has no usable prompt: 1 rows hold no prompt",
        ),
        (
            [{"prompt": "a", "reward": "much"}],
            {},
            "dataset prompts@1.0.0, prompts.jsonl: row 1: reward must be a number, got 'much'",
        ),
        ([{"prompt": "a"}], {"reward_recipe": {"name": "no_such"}}, "Unknown reward recipe: no_such"),
        (
            [{"prompt": "a"}],
            {"reward_recipe": {"name": "digits", "params": {"baseline": "median"}}},
            "params.baseline must be one of group_mean, batch_mean, none, got 'median'",
        ),
        (
            [{"prompt": "a", "answer": "1"}, {"prompt": "b"}],
            {"reward_recipe": {"name": "exact_match_v1"}},
            "prompts@1.0.0 row 2: exact_match_v1 requires an expected output",
        ),
        (
            [{"prompt": "a", "divisor": 2}, {"prompt": "b", "divisor": 0}],
            {"reward_recipe": {"name": "divide"}},
            "prompts@1.0.0 row 2: divide failed: ZeroDivisionError: float division by zero",
        ),
        (
            [{"prompt": "a", "divisor": "nan"}],
            {"reward_recipe": {"name": "divide"}},
            "prompts@1.0.0 row 1: divide gave the reward nan",
        ),
        ([{"prompt": "a"}], {"world_goal": "win"}, "world_goal is about live worlds"),
    ],
)
def test_a_job_that_cannot_go_on_says_which_row_or_setting_it_is(
    job_server: JobServer, tmp_path: Path, rows: list[dict[str, Any]], config: Mapping[str, Any], message: str
) -> None:
    spec = rl_spec(job_server.url, job_server.model, tmp_path, rows, {**QUICK, "steps": 1, **config})
    with pytest.raises(JobFailedError) as failure:
        train(spec)
    assert str(failure.value).startswith(message)


# --- recorded trajectories --------------------------------------------------------------------------------------------

TRAJECTORIES = [
    {
        "schema_version": "ATIF-v1.0",
        "steps": [
            {"source": "user", "message": "say 1"},
            {"source": "agent", "message": "1"},
            {"source": "user", "message": "say 2"},
            {"source": "agent", "message": "2"},
        ],
        "metadata": {"reward": 0.5},
    },
    {"messages": [{"role": "user", "content": "say 3"}, {"role": "assistant", "content": "3"}]},
    {"text": "nothing was done"},
]


def test_each_recorded_step_is_asked_as_a_prompt_of_its_own(job_server: JobServer, tmp_path: Path) -> None:
    config = {**QUICK, "num_rollouts": 3, "batch_size": 3, "reward_recipe": DIGITS, "prompt_dataset_ref": None}
    config["trajectory_dataset_refs"] = [{"name": "runs", "version": "1.0.0"}]
    refs = make_refs(trajectory_datasets=(write_dataset(tmp_path, TRAJECTORIES, "runs"),))
    events = train(attrs.evolve(rl_spec(job_server.url, job_server.model, tmp_path, [], config), refs=refs))
    assert messages(events, "warning") == ["3 prompts of runs@1.0.0; 1 rows hold no prompt and were skipped"]
    steps = {
        (
            judged.expected_output,
            judged.reward,
            tuple(message["content"] for message in cast(Any, judged.row)["messages"]),
        )
        for judged in digit_recipe.judged_here
    }
    assert steps == {("1", 0.5, ("say 1",)), ("2", 0.5, ("say 1", "1", "say 2")), ("3", None, ("say 3",))}
    (end,) = of_type(events, EventType.TRAINING_END)
    assert end.artifacts["trajectory_datasets"] == ["runs@1.0.0"]


@pytest.mark.parametrize(
    ("sources", "recipe"),
    [
        ({"trajectory_dataset_refs": [REF]}, "trajectory_imitation_v1"),
        ({"prompt_dataset_ref": REF}, "row_reward_v1"),
        ({"prompt_dataset_ref": REF, "trajectory_dataset_refs": [REF]}, "row_reward_v1"),
    ],
)
def test_a_job_that_names_no_recipe_gets_that_of_its_data(sources: dict[str, Any], recipe: str) -> None:
    assert default_recipe(TinkerRLJobConfig.model_validate({"algorithm": "ppo", **sources})) == recipe


# --- settings and baselines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "group_sizes"),
    [
        ({}, (1,) * 8),
        ({"num_rollouts": 24, "batch_size": 4}, (6,) * 4),
        ({"num_rollouts": 7, "batch_size": 3}, (3, 2, 2)),
        ({"num_rollouts": 2, "batch_size": 5}, (1, 1)),
        ({"num_rollouts": 3}, (1, 1, 1)),
        ({"batch_size": 12}, (1,) * 12),
    ],
)
def test_the_rollouts_of_a_step_are_shared_out_among_its_prompts(
    config: dict[str, Any], group_sizes: tuple[int, ...]
) -> None:
    request = TinkerRLJobConfig.model_validate(
        {"algorithm": "ppo", "prompt_dataset_ref": {"name": "a", "version": "1"}, **config}
    )
    assert RLSettings.of(request).group_sizes == group_sizes


@pytest.mark.parametrize(
    ("baseline", "groups", "expected"),
    [
        (Baseline.GROUP_MEAN, [[1.0, 0.0], [3.0]], [[0.5, -0.5], [3.0 - 4 / 3]]),
        (Baseline.BATCH_MEAN, [[1.0, 0.0], [2.0]], [[0.0, -1.0], [1.0]]),
        (Baseline.NONE, [[1.0, 0.0], [2.0]], [[1.0, 0.0], [2.0]]),
        (Baseline.GROUP_MEAN, [[0.1, 0.1, 0.1]], [[0.0, 0.0, 0.0]]),
        (Baseline.GROUP_MEAN, [[0.7]], [[0.7]]),
        (Baseline.GROUP_MEAN, [], []),
    ],
)
def test_a_reward_is_compared_with_its_baseline(
    baseline: Baseline, groups: list[list[float]], expected: list[list[float]]
) -> None:
    assert advantages(groups, baseline) == expected


def test_the_baseline_is_not_the_recipes_business() -> None:
    assert split_baseline({"needle": "a", "baseline": "none"}) == (Baseline.NONE, {"needle": "a"})
    assert split_baseline({}) == (Baseline.GROUP_MEAN, {})
    with pytest.raises(RewardError, match="must be one of"):
        split_baseline({"baseline": 0})


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_learns_to_write_an_equals_sign(tmp_path: Path) -> None:
    model = os.environ.get("TINKER_TEST_MODEL")
    if model is None:
        pytest.skip("TINKER_TEST_MODEL names no directory of SmolLM2-135M-Instruct")
    rows = [{"prompt": f"What is {a} + {b}?"} for a in range(2, 10) for b in range(2, 10)]
    prompt = "Reply with only the number."
    capability = FrozenCapability(name="helper", version="1.0.0", prompt=prompt, runtime_digest="sha256:00")
    config = {
        "reward_recipe": {"name": "contains_v1", "params": {"needle": "="}},
        "steps": 12,
        "num_rollouts": 24,
        "batch_size": 4,
        "max_new_tokens": 8,
        "learning_rate": 5e-4,
    }
    with run_server("--base-model", model, "--data-dir", str(tmp_path / "data"), "--dtype", "bfloat16") as url:
        events = run_worker(rl_spec(url, model, tmp_path / "job", rows, config, {"capability": capability}))
    rewards = final_metrics(events)["train/reward"]
    assert rewards[0] < 0.5
    assert max(rewards) >= 0.9, rewards
