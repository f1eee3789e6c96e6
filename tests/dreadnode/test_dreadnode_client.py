"""What users of the dreadnode client do: create, list, get, wait, read logs and artifacts, cancel, retry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.dreadnode.conftest import CAPABILITY, MODEL, Dreadnode, call, options

pytestmark = pytest.mark.slow


def ref(text: str) -> dict[str, str]:
    name, version = text.split("@")
    return {"name": name, "version": version}


BASE: dict[str, Any] = {"model": MODEL, "capability_ref": ref(CAPABILITY)}
SUMS = {"prompt_dataset_ref": ref("sums@1.0.0")}
DATASET = {"dataset_ref": ref("sums@1.0.0")}
GRPO = {"task_ref": "counting", "reward_recipe": {"name": "exact_match_v1"}, **SUMS}
FOREVER = {"steps": 1_000_000}
RECORDS = {
    "sft": ("CreateTinkerSFTJobRequest", "TinkerSFTJobConfig"),
    "rl": ("CreateTinkerRLJobRequest", "TinkerRLJobConfig"),
    "grpo": ("CreateRayGRPOJobRequest", "RayGRPOJobConfig"),
}
KEYS = {"sft": ("tinker", "sft"), "rl": ("tinker", "rl"), "grpo": ("ray", "rl")}


def create(kind: str, config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A call that makes a job out of the client's own records."""
    request = {"model": RECORDS[kind][0], "fields": {**BASE, "config": config, **fields}}
    return call("create_training_job", request=request)


def send(kind: str, config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A call that sends a request as it is, past the client's own checks."""
    backend, trainer_type = KEYS[kind]
    sent = {**BASE, "backend": backend, "trainer_type": trainer_type, "config": config, **fields}
    return call("create_training_job", request={"fields": sent})


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_trains_and_reads_what_came_of_it(dreadnode: Dreadnode) -> None:
    flags = options(model=MODEL, capability=CAPABILITY, dataset="sums@1.0.0", eval_dataset="sums@1.0.0", name="my-sft")
    more = options(steps=2, batch_size=4, learning_rate=0.01, lora_rank=4, lora_alpha=8, max_sequence_length=128)
    waiting = ("--tag", "a", "--tag", "b", "--wait", "--poll-interval-sec", "0.2")
    job = dreadnode.json("sft", *flags, *more, *waiting)
    assert (job["status"], job["error"], job["tags"]) == ("completed", None, ["a", "b"])
    assert job["metrics"]["steps"] == [1, 2]
    assert len(job["metrics"]["train/loss"]) == 2
    assert job["metrics"]["eval/loss"] > 0
    assert job["capability"]["runtime_digest"].startswith("sha256:")
    assert job["id"] in dreadnode.command("get", job["id"])
    assert f"{job['id']} completed my-sft" in dreadnode.command("wait", job["id"])
    logs = dreadnode.command("logs", job["id"])
    assert "info step 2/2" in logs
    artifacts = dreadnode.json("artifacts", job["id"])["artifacts"]
    assert artifacts["checkpoints"][-1].startswith("tinker://")
    assert artifacts["dataset"] == "sums@1.0.0"
    listed = dreadnode.json("list", "--status", "completed", "--trainer-type", "sft", "--page-size", "50")
    assert [one["name"] for one in listed if one["id"] == job["id"]] == ["my-sft"]


def test_the_command_trains_with_a_reward(dreadnode: Dreadnode) -> None:
    flags = options(model=MODEL, capability=CAPABILITY, algorithm="importance_sampling", prompt_dataset="sums@1.0.0")
    reward = options(task="counting@1.0.0", reward_recipe="contains_v1", reward_params='{"needle": "1"}')
    more = options(steps=2, num_rollouts=4, batch_size=2, max_new_tokens=4, temperature=1.0, learning_rate=0.01)
    modes = options(execution_mode="fully_async", max_steps_off_policy=2, weight_sync_interval=1, prompt_split="train")
    evaluation = options(eval_dataset="sums@1.0.0", eval_interval=1, eval_max_rollouts=2)
    job = dreadnode.json(
        "rl", *flags, *reward, *more, *modes, *evaluation, "--stop", "\n", "--wait", "--poll-interval-sec", "0.2"
    )
    assert (job["status"], job["error"]) == ("completed", None)
    assert len(job["metrics"]["train/reward"]) == 2
    assert job["metrics"]["async/max_staleness_observed"] <= 2
    assert job["task_ref"] == "counting@1.0.0"
    (context,) = dreadnode.results(call("get_training_job_rl_context", job["id"]))
    assert context["task"]["instruction"] == "Say a number."
    assert context["capability_entry_prompt"] == "Answer briefly."


def test_the_command_cancels_a_job_and_waiting_for_it_fails(dreadnode: Dreadnode) -> None:
    flags = options(model=MODEL, capability=CAPABILITY, dataset="sums@1.0.0", steps=FOREVER["steps"])
    job = dreadnode.json("sft", *flags)
    assert job["status"] == "queued"
    dreadnode.command("cancel", job["id"], "--yes")
    waited = dreadnode.command("wait", job["id"], "--poll-interval-sec", "0.2", status=1)
    assert f"Training job {job['id']} ended with status cancelled" in waited
    again = dreadnode.command("cancel", job["id"], "--yes", status=1)
    assert "409" in again
    assert "ConflictError" in again


def test_the_command_browses_the_models(dreadnode: Dreadnode) -> None:
    (model,) = dreadnode.json("catalog")["models"]
    assert (model["tinker_id"], model["type"]) == (MODEL, "dense")
    assert "sft" in model["supported_algorithms"]
    assert dreadnode.json("catalog", "--family", "mamba")["models"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("get", "nope"), "404: Training job not found (NotFoundError)"),
        (("list", "--organization", "other"), "404"),
        (("sft", *options(model="bad/model", capability=CAPABILITY, dataset="sums@1.0.0")), "unknown model: bad/model"),
        (("sft", *options(model=MODEL, capability=CAPABILITY, dataset="sums@2.0.0")), "dataset not found: sums@2.0.0"),
        (("sft", *options(model=MODEL, capability="other@1.0.0", dataset="sums@1.0.0")), "capability not found: other"),
    ],
)
def test_the_command_shows_why_it_is_refused(dreadnode: Dreadnode, arguments: tuple[str, ...], said: str) -> None:
    assert said in dreadnode.command(*arguments, status=1)


# --- the SDK ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(dreadnode: Dreadnode) -> Iterator[dict[str, Any]]:
    """A job that runs on and on. Only one runs at a time here, so all later ones wait."""
    (job,) = dreadnode.results(create("sft", {**DATASET, **FOREVER}, name="first", project_ref="mine"))
    yield job
    (stopped,) = dreadnode.results(call("cancel_training_job", job["id"]))
    assert stopped["cancel_requested_at"] is not None
    dreadnode.command("wait", job["id"], "--poll-interval-sec", "0.2", status=1)


def test_the_sdk_creates_all_kinds_lists_cancels_and_retries(dreadnode: Dreadnode, first: dict[str, Any]) -> None:
    rl, grpo = dreadnode.results(
        create("rl", {"algorithm": "ppo", "reward_recipe": {"name": "row_reward_v1"}, **SUMS}, project_ref="mine"),
        create("grpo", GRPO, project_ref="mine", tags=["ray"]),
    )
    assert [(job["backend"], job["algorithm"]) for job in (first, rl, grpo)] == [
        ("tinker", None),
        ("tinker", "ppo"),
        ("ray", "grpo"),
    ]
    assert grpo["task_ref"] == "counting@1.0.0"
    mine = call("list_training_jobs", project_ref="mine")
    ray = call("list_training_jobs", project_ref="mine", backend="ray")
    listed, of_ray = dreadnode.results(mine, ray)
    assert [job["id"] for job in listed["items"]] == [grpo["id"], rl["id"], first["id"]]
    assert (listed["total"], of_ray["total"]) == (3, 1)
    ids = [job["id"] for job in (grpo, rl)]
    cancelled = dreadnode.results(*(call("cancel_training_job", job_id) for job_id in ids))
    assert [(job["status"], job["completed_at"] is None) for job in cancelled] == [("cancelled", False)] * 2
    retried, again, got = dreadnode.results(
        call("retry_training_job", rl["id"]), call("cancel_training_job", rl["id"]), call("get_training_job", rl["id"])
    )
    assert (retried["status"], retried["completed_at"], retried["error"]) == ("queued", None, None)
    assert [again["status"], got["status"]] == ["cancelled", "cancelled"]
    logs, artifacts = dreadnode.results(
        call("list_training_job_logs", rl["id"]), call("get_training_job_artifacts", rl["id"])
    )
    assert "retry #1" in [line["message"] for line in logs["items"]]
    assert artifacts == {"artifacts": {}}


@pytest.mark.usefixtures("first")
def test_progress_of_a_job_that_has_ended_changes_nothing(dreadnode: Dreadnode) -> None:
    (job,) = dreadnode.results(create("grpo", GRPO))
    (ended,) = dreadnode.results(call("cancel_training_job", job["id"]))
    assert ended["status"] == "cancelled"
    update = {"fields": {"event_type": "step_complete", "metrics": {"steps": [1], "train/reward": [1.0]}}}
    (after,) = dreadnode.results(call("post_training_job_progress", job["id"], request=update))
    assert after == ended


@pytest.mark.usefixtures("first")
def test_the_sdk_tells_conflicts_from_what_does_not_exist(dreadnode: Dreadnode) -> None:
    (job,) = dreadnode.results(create("grpo", GRPO))
    _, conflict, unknown = dreadnode.calls(
        call("cancel_training_job", job["id"]),
        call("cancel_training_job", job["id"]),
        call("retry_training_job", "no-such-job"),
    )
    assert (conflict["error"], unknown["error"]) == ("ConflictError", "NotFoundError")


# --- validation -------------------------------------------------------------------------------------------------------

WORLD = {"algorithm": "ppo", "world_manifest_id": "w"}
PPO = {"algorithm": "ppo", **SUMS}
RULES: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {}, "Tinker SFT jobs require dataset_ref or at least one trajectory_dataset_ref"),
    (
        "rl",
        {**PPO, "world_runtime_id": "r"},
        "world_manifest_id is required when world_runtime_id is provided",
    ),
    ("rl", {**WORLD, "world_agent_name": "a"}, "world_runtime_id is required when world_agent_name is provided"),
    (
        "rl",
        {"algorithm": "ppo"},
        "Tinker RL jobs require prompt_dataset_ref, world_manifest_id, or at least one trajectory_dataset_ref",
    ),
    (
        "rl",
        {**PPO, "execution_mode": "fully_async"},
        "max_steps_off_policy is required for async execution modes",
    ),
    (
        "rl",
        {**PPO, "execution_mode": "one_step_off_async", "max_steps_off_policy": 2},
        "max_steps_off_policy must be 1 for one_step_off_async execution mode",
    ),
    ("rl", {**PPO, "eval_interval": 2}, "eval_interval / eval_max_rollouts require eval_dataset_ref"),
    ("rl", {**PPO, "eval_max_rollouts": 2}, "eval_interval / eval_max_rollouts require eval_dataset_ref"),
]
COUNTS = {
    "sft": (
        *("max_sequence_length", "batch_size", "gradient_accumulation_steps", "steps", "epochs"),
        *("lora_rank", "lora_alpha", "checkpoint_interval"),
    ),
    "rl": (
        *("steps", "lora_rank", "max_turns", "max_episode_steps", "num_rollouts", "batch_size"),
        *("weight_sync_interval", "max_steps_off_policy", "max_new_tokens", "checkpoint_interval"),
    ),
    "grpo": (
        *("max_turns", "max_episode_steps", "num_rollouts", "batch_size", "num_rollout_workers"),
        *("buffer_size", "checkpoint_interval"),
    ),
}
SMALLEST = {"sft": DATASET, "rl": PPO, "grpo": GRPO}


def test_every_rule_is_told_in_the_clients_own_words(dreadnode: Dreadnode) -> None:
    """The client checks these itself; what it does not check, or an older one sends, the server answers the same."""
    own = dreadnode.calls(*(create(kind, config) for kind, config, _ in RULES))
    served = dreadnode.calls(*(send(kind, config) for kind, config, _ in RULES))
    for (_, _, message), mine, ours in zip(RULES, own, served, strict=True):
        assert mine["error"] == "ValidationError"
        assert f"Value error, {message} [type=value_error" in mine["message"]
        assert ours["error"] == "RuntimeError"
        assert ours["message"].startswith("422: ")
        assert f"'msg': '{message}'" in ours["message"]


def test_every_bound_that_the_client_does_not_check_is_checked_here(dreadnode: Dreadnode) -> None:
    wrong: list[tuple[str, str, float, str]] = [
        (kind, name, 0, "Input should be greater than or equal to 1") for kind in COUNTS for name in COUNTS[kind]
    ]
    wrong += [(kind, "learning_rate", 0.0, "Input should be greater than 0") for kind in COUNTS]
    wrong += [("rl", "temperature", -0.5, "Input should be greater than or equal to 0")]
    answers = dreadnode.calls(*(create(kind, {**SMALLEST[kind], name: value}) for kind, name, value, _ in wrong))
    for (_, name, _, message), answer in zip(wrong, answers, strict=True):
        assert answer["error"] == "RuntimeError", (name, answer)
        assert answer["message"].startswith("422: ")
        assert f"'loc': ['body', 'config', '{name}'], 'msg': '{message}'" in answer["message"]


def test_what_only_a_server_knows_is_refused_when_the_job_is_submitted(dreadnode: Dreadnode) -> None:
    unknown, unmet, environment, missing = dreadnode.calls(
        create("rl", {**PPO, "reward_recipe": {"name": "nothing_v1"}}),
        create("rl", {**PPO, "reward_recipe": {"name": "contains_v1"}}),
        create("rl", {**PPO, "reward_recipe": {"name": "task_env_agent_v1"}, "task_ref": "counting"}),
        create("rl", {**WORLD, "world_manifest_id": "nowhere"}),
    )
    assert "Unknown reward recipe: nothing_v1" in unknown["message"]
    assert "contains_v1 requires params.needle" in unmet["message"]
    assert "task_env_agent_v1 needs an environment" in environment["message"]
    assert "worlds are not configured on this server" in missing["message"]
