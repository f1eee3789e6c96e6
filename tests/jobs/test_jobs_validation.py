"""Every field of the three kinds of job: what is kept, what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.jobs.hosting import JOBS, JobsApi, body, ref, serve_jobs
from tinker_core.hookspecs import hookimpl
from tinker_core.rewards import EnvironmentPlugin
from tinker_jobs.requests import REQUEST_KINDS
from tinker_jobs.service import checks


@pytest.fixture
def api(jobs_api: JobsApi) -> JobsApi:
    return jobs_api


def mistakes(answer: httpx.Response) -> dict[str, str]:
    """What is wrong, by the path below ``body``."""
    assert answer.status_code == 422, answer.text
    found = answer.json()["detail"]
    assert all(set(one) == {"loc", "msg", "type"} and one["loc"][0] == "body" for one in found)
    return {".".join(map(str, one["loc"][1:])): one["msg"] for one in found}


# --- fields -----------------------------------------------------------------------------------------------------------

_INT, _FLOAT, _TEXT = (
    "Input should be a valid integer",
    "Input should be a valid number",
    "Input should be a valid string",
)
_AT_LEAST_1 = "Input should be greater than or equal to 1"
COUNT = (3, [(0, _AT_LEAST_1), (1.5, _INT)])
POSITIVE = (1e-4, [(0, "Input should be greater than 0"), (-1e-4, "Input should be greater than 0"), ("x", _FLOAT)])
DATASET = (ref("gsm8k"), [("gsm8k@1.0.0", "Input should be a valid dictionary"), ({"name": "gsm8k"}, "Field required")])
DATASETS = ([ref("traj", "0.1.0"), ref("traj2", "0.2.0")], [(ref("traj", "0.1.0"), "Input should be a valid list")])
TEXT = ("text", [(7, _TEXT), (["text"], _TEXT)])
RECIPE = (
    {"name": "row_reward_v1", "params": {"default": 0.5}},
    [({"params": {}}, "Field required"), ({"name": "row_reward_v1", "x": 1}, "Extra inputs are not permitted")],
)
TASK = ("my-task@1.0.0", TEXT[1])

LITERAL = "Input should be "


def counts(*names: str) -> dict[str, Any]:
    return {name: COUNT for text in names for name in text.split()}


SFT_FIELDS: dict[str, Any] = {
    "dataset_ref": DATASET,
    "trajectory_dataset_refs": DATASETS,
    "eval_dataset_ref": DATASET,
    **counts(
        "max_sequence_length batch_size gradient_accumulation_steps steps epochs lora_rank lora_alpha "
        "checkpoint_interval"
    ),
    "learning_rate": POSITIVE,
}
RL_FIELDS: dict[str, Any] = {
    "algorithm": ("importance_sampling", [("grpo", LITERAL), (None, "Field required")]),
    "task_ref": TASK,
    "world_manifest_id": ("lab", TEXT[1]),
    "world_runtime_id": ("front", TEXT[1]),
    "world_agent_name": ("scout", TEXT[1]),
    "world_goal": TEXT,
    "prompt_dataset_ref": DATASET,
    "trajectory_dataset_refs": DATASETS,
    "reward_recipe": RECIPE,
    "world_reward": ({"name": "goal_only_v1", "params": {}}, [({}, "Field required"), ("x", LITERAL)]),
    "execution_mode": ("fully_async", [("async", LITERAL)]),
    "prompt_split": ("train", TEXT[1]),
    **counts(
        "steps lora_rank max_turns max_episode_steps num_rollouts batch_size weight_sync_interval "
        "max_steps_off_policy max_new_tokens checkpoint_interval eval_interval eval_max_rollouts"
    ),
    "learning_rate": POSITIVE,
    "temperature": (0, [(-0.1, "Input should be greater than or equal to 0"), ("hot", _FLOAT)]),
    "stop": (["</s>", "\n"], [("</s>", "Input should be a valid list"), ([1], _TEXT)]),
    "eval_dataset_ref": DATASET,
}
GRPO_FIELDS: dict[str, Any] = {
    "algorithm": ("grpo", [("ppo", LITERAL)]),
    "task_ref": (TASK[0], [*TASK[1], (None, "Field required")]),
    "prompt_dataset_ref": (DATASET[0], [*DATASET[1], (None, "Field required")]),
    "reward_recipe": RECIPE,
    "execution_mode": ("colocated", [("sync", LITERAL)]),
    **counts("num_rollouts batch_size num_rollout_workers checkpoint_interval"),
    "max_turns": (1, COUNT[1]),
    "max_episode_steps": (1, COUNT[1]),
    "buffer_size": (16, COUNT[1]),
    "learning_rate": POSITIVE,
}
FIELDS = {"sft": SFT_FIELDS, "rl": RL_FIELDS, "grpo": GRPO_FIELDS}
WORLD: dict[str, Any] = {"prompt_dataset_ref": None, "world_manifest_id": "lab"}
EVAL = {"eval_dataset_ref": ref("gsm8k-test")}
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("rl", "execution_mode"): {"max_steps_off_policy": 2},
    ("rl", "world_manifest_id"): {"prompt_dataset_ref": None},
    ("rl", "world_runtime_id"): WORLD,
    ("rl", "world_agent_name"): {**WORLD, "world_runtime_id": "front"},
    ("rl", "world_goal"): WORLD,
    ("rl", "world_reward"): WORLD,
    ("rl", "max_turns"): WORLD,
    ("rl", "max_episode_steps"): WORLD,
    ("rl", "eval_interval"): EVAL,
    ("rl", "eval_max_rollouts"): EVAL,
}
"""What a field needs beside itself, and does not go with."""


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in FIELDS.items() for field in fields])
def test_every_field_is_kept_and_its_bounds_are_checked(api: JobsApi, kind: str, field: str) -> None:
    good, bad = FIELDS[kind][field]
    beside = BESIDE.get((kind, field), {})
    assert api.new(kind, {**beside, field: good})["config"][field] == good
    for value, message in bad:
        refused = mistakes(api.create(body(kind, {**beside, field: value})))
        place = next(iter(refused))
        assert place.startswith(f"config.{field}"), refused
        assert refused[place].startswith(message), refused


def test_the_fields_tried_here_are_all_that_there_are() -> None:
    for (backend, trainer_type), request in REQUEST_KINDS.items():
        kind = "grpo" if backend == "ray" else trainer_type
        assert set(request.model_fields["config"].annotation.model_fields) == set(FIELDS[kind])


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_that_nobody_knows_are_refused(api: JobsApi, kind: str) -> None:
    refused = mistakes(api.create(body(kind, {"lora_rnak": 8}, colour="red")))
    assert refused == dict.fromkeys(("config.lora_rnak", "colour"), "Extra inputs are not permitted")


WRAPPER: dict[str, Any] = {
    "name": ("my job", [(1, _TEXT)]),
    "model": ("local/tiny", [(1, _TEXT)]),
    "project_ref": ("apollo", [({}, _TEXT)]),
    "run_ref": ("run-7", [(7, _TEXT)]),
    "capability_ref": (ref("helper"), [("helper@1.0.0", "Input should be a valid dictionary"), ({}, "Field required")]),
    "tags": (["a", "b"], [("a", "Input should be a valid list"), ([None], _TEXT)]),
    "config": ({"dataset_ref": ref("gsm8k")}, [([], "Input should be a valid dictionary")]),
}


@pytest.mark.parametrize("field", WRAPPER)
def test_every_field_around_the_config_is_kept_and_checked(api: JobsApi, field: str) -> None:
    good, bad = WRAPPER[field]
    job = api.new(**{field: good})
    answered = job["capability"] if field == "capability_ref" else job[field]
    assert {key: answered[key] for key in good} == good if isinstance(good, dict) else answered == good
    for value, message in bad:
        refused = mistakes(api.create({**body(), field: value}))
        place = next(iter(refused))
        assert place.startswith(field)
        assert refused[place].startswith(message)


@pytest.mark.parametrize("field", ["model", "capability_ref", "config"])
def test_what_every_job_needs_is_demanded(api: JobsApi, field: str) -> None:
    request = body()
    del request[field]
    assert mistakes(api.create(request)) == {field: "Field required"}


def test_what_is_left_out_has_the_defaults_of_the_manifest(api: JobsApi) -> None:
    job = api.new("rl")
    assert job["tags"] == []
    assert [job[name] for name in ("name", "project_ref", "run_ref", "error", "task_ref", "dataset_ref")] == [None] * 6
    assert job["trajectory_dataset_refs"] == []
    assert job["config"] == body("rl")["config"]  # as it was sent
    assert api.new("grpo")["algorithm"] == "grpo"


@pytest.mark.parametrize(
    ("backend", "trainer_type"), [("ray", "sft"), ("tinker", "grpo"), ("local", "sft"), (None, "sft"), ([], {})]
)
def test_other_pairs_of_backend_and_trainer_are_refused(api: JobsApi, backend: object, trainer_type: object) -> None:
    refused = mistakes(api.create({**body(), "backend": backend, "trainer_type": trainer_type}))
    assert refused == {"backend": "backend and trainer_type must be one of tinker/sft, tinker/rl, ray/rl"}


# --- rules ------------------------------------------------------------------------------------------------------------

RULES: dict[str, tuple[str, dict[str, Any], str]] = {
    "sft without data": (
        "sft",
        {"dataset_ref": None},
        "Tinker SFT jobs require dataset_ref or at least one trajectory_dataset_ref",
    ),
    "runtime without manifest": (
        "rl",
        {"world_runtime_id": "front"},
        "world_manifest_id is required when world_runtime_id is provided",
    ),
    "agent without runtime": (
        "rl",
        {"world_manifest_id": "lab", "world_agent_name": "scout"},
        "world_runtime_id is required when world_agent_name is provided",
    ),
    "rl without input": (
        "rl",
        {"prompt_dataset_ref": None},
        "Tinker RL jobs require prompt_dataset_ref, world_manifest_id, or at least one trajectory_dataset_ref",
    ),
    "async without budget": (
        "rl",
        {"execution_mode": "fully_async"},
        "max_steps_off_policy is required for async execution modes",
    ),
    "one step off without budget": (
        "rl",
        {"execution_mode": "one_step_off_async"},
        "max_steps_off_policy is required for async execution modes",
    ),
    "one step off with two": (
        "rl",
        {"execution_mode": "one_step_off_async", "max_steps_off_policy": 2},
        "max_steps_off_policy must be 1 for one_step_off_async execution mode",
    ),
    "interval without eval data": (
        "rl",
        {"eval_interval": 5},
        "eval_interval / eval_max_rollouts require eval_dataset_ref",
    ),
    "rollouts without eval data": (
        "rl",
        {"eval_max_rollouts": 5},
        "eval_interval / eval_max_rollouts require eval_dataset_ref",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_its_own_words(api: JobsApi, rule: str) -> None:
    kind, config, message = RULES[rule]
    assert mistakes(api.create(body(kind, config))) == {"config": message}


@pytest.mark.parametrize("data", [{"dataset_ref": None}, {}], ids=["alone", "with a dataset"])
def test_supervised_jobs_take_trajectories_alone_or_beside_a_dataset(api: JobsApi, data: dict[str, Any]) -> None:
    job = api.new("sft", {**data, "trajectory_dataset_refs": [ref("traj", "0.1.0")]})
    assert job["trajectory_dataset_refs"] == [ref("traj", "0.1.0")]


@pytest.mark.parametrize(
    "config",
    [{"trajectory_dataset_refs": [ref("traj", "0.1.0")]}, {"world_manifest_id": "lab"}],
    ids=["trajectories", "world"],
)
def test_reinforcement_learning_needs_no_prompts_where_there_is_other_input(
    api: JobsApi, config: dict[str, Any]
) -> None:
    assert api.new("rl", {"prompt_dataset_ref": None, **config})["prompt_dataset_ref"] is None


def test_one_step_off_takes_a_budget_of_one(api: JobsApi) -> None:
    mode = {"execution_mode": "one_step_off_async", "max_steps_off_policy": 1}
    assert api.new("rl", mode)["config"] == {**body("rl")["config"], **mode}


# --- what the server must have ----------------------------------------------------------------------------------------


def test_a_model_that_is_not_served_is_refused_with_those_that_are(api: JobsApi) -> None:
    known = "local/tiny, local/m, local/smollm2-135m-instruct"
    assert mistakes(api.create(body(model="gpt"))) == {"model": f"unknown model: gpt; known models: {known}, silent"}
    assert mistakes(api.create(body(model="frozen"))) == {
        "model": f"model frozen cannot be trained here; known models: {known}, silent"
    }
    assert mistakes(api.create(body("rl", model="silent"))) == {
        "model": f"model silent cannot be trained and sampled from here; known models: {known}"
    }
    assert api.new(model="silent")["model"] == "silent"


@pytest.mark.parametrize("path", ["tinker://nobody/weights/w", "tinker://", "tinker://x", "tinker://a/b/c"])
def test_a_checkpoint_that_cannot_be_read_is_refused(api: JobsApi, path: str) -> None:
    assert path in mistakes(api.create(body(model=path)))["model"]


def test_reward_recipes_are_checked_by_name_parameters_and_task(api: JobsApi) -> None:
    def refuse(recipe: dict[str, Any], kind: str = "rl", **config: Any) -> dict[str, str]:
        return mistakes(api.create(body(kind, {"reward_recipe": recipe, **config})))

    known = "contains_v1, exact_match_v1, gsm8k_v1, row_reward_v1, task_verifier_v1, trajectory_imitation_v1"
    for kind in ("rl", "grpo"):
        assert refuse({"name": "nice_v1"}, kind) == {
            "config.reward_recipe.name": f"Unknown reward recipe: nice_v1; known recipes: {known}"
        }
    assert refuse({"name": "contains_v1"}) == {"config.reward_recipe.params": "contains_v1 requires params.needle"}
    for kind in ("rl", "grpo"):
        recipe = {"name": "row_reward_v1", "params": {"baseline": "best"}}
        assert "baseline must be one of" in refuse(recipe, kind)["config.reward_recipe.params"]
    assert refuse({"name": "task_verifier_v1"}) == {"config.task_ref": "task_verifier_v1 requires task_ref"}
    assert api.new("rl", {"reward_recipe": {"name": "task_verifier_v1"}, "task_ref": "my-task"})["task_ref"] == (
        "my-task@1.0.0"
    )


def test_world_settings_need_a_world_and_names_that_exist(api: JobsApi) -> None:
    for field, value in (("world_goal", "win"), ("world_reward", {"name": "goal_only_v1"})):
        assert mistakes(api.create(body("rl", {field: value}))) == {
            f"config.{field}": f"world_manifest_id is required when {field} is provided"
        }
    refused = mistakes(api.create(body("rl", {**WORLD, "world_reward": {"name": "kind_v1"}})))
    assert "kind_v1" in refused["config.world_reward"]
    assert "heuristic_v1" in refused["config.world_reward"]
    refused = mistakes(api.create(body("rl", {**WORLD, "prompt_dataset_ref": ref("gsm8k")})))
    assert set(refused) == {"config.prompt_dataset_ref"}


def test_turns_that_nothing_takes_are_refused(api: JobsApi) -> None:
    for kind in ("rl", "grpo"):
        refused = mistakes(api.create(body(kind, {"max_turns": 2, "max_episode_steps": 2})))
        assert set(refused) == {"config.max_turns", "config.max_episode_steps"}


@pytest.mark.parametrize(
    "config", [{"batch_size": 4, "num_rollouts": 6}, {"batch_size": 4, "num_rollouts": 4}, {"buffer_size": 7}]
)
def test_sizes_that_make_no_grpo_step_are_refused(api: JobsApi, config: dict[str, int]) -> None:
    assert set(mistakes(api.create(body("grpo", config)))) == {f"config.{list(config)[-1]}"}


class Sandboxes:
    @hookimpl
    def tinker_register_environment(self, register: Any) -> None:
        def refuse(*_: object) -> Any:
            raise AssertionError("no test here runs a job")

        register(EnvironmentPlugin(name="box", open=refuse))


@pytest.mark.parametrize("name", ["task_env_verifier_v1", "task_env_agent_v1"])
def test_environment_recipes_need_a_provider(api: JobsApi, name: str) -> None:
    config = {"reward_recipe": {"name": name}, "task_ref": "my-task@1.0.0"}
    assert mistakes(api.create(body("rl", config))) == {
        "config.reward_recipe.name": f"{name} needs an environment to do tasks in, and no plugin of this server "
        "provides one; install a plugin that implements tinker_register_environment"
    }


def test_environment_recipes_with_a_provider_need_a_task_and_prompts(tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = {"reward_recipe": {"name": "task_env_verifier_v1"}}
    with serve_jobs(tmp_path_factory.mktemp("sandboxes"), Sandboxes()) as api:
        offline = {"prompt_dataset_ref": None, "trajectory_dataset_refs": [ref("traj", "0.1.0")]}
        assert mistakes(api.create(body("rl", {**recipe, **offline}))) == {
            "config.task_ref": "task_env_verifier_v1 requires task_ref",
            "config.prompt_dataset_ref": "task_env_verifier_v1 requires prompt_dataset_ref",
        }
        refused = mistakes(api.create(body("rl", {**recipe, "task_ref": "my-task"})))
        assert "env_flag or env_script" in refused["config.reward_recipe"]
        job = api.new("rl", {"task_ref": "boxed", "reward_recipe": {"name": "task_env_agent_v1"}, "max_turns": 5})
        assert job["task_ref"] == "boxed@1.0.0"


def test_ray_jobs_are_refused_where_ray_is_not_installed(api: JobsApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ray_is_installed", lambda: False)
    assert mistakes(api.create(body("grpo"))) == {
        "backend": "backend ray is not installed on this server; install it with: pip install 'tinker-jobs[ray]'"
    }


def test_all_mistakes_are_told_at_once(api: JobsApi) -> None:
    config = {"prompt_dataset_ref": ref("none"), "task_ref": "nothing@9", "reward_recipe": {"name": "nice_v1"}}
    refused = mistakes(api.create(body("rl", config, model="gpt", capability_ref=ref("helper", "9.9.9"))))
    assert set(refused) == {
        "model", "capability_ref", "config.prompt_dataset_ref", "config.task_ref", "config.reward_recipe.name",
    }  # fmt: skip
    assert refused["capability_ref"].startswith("capability not found: helper@9.9.9")
    assert refused["config.prompt_dataset_ref"].startswith("dataset not found: none@1.0.0")


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "JSON decode error"),
        (b"", "JSON decode error"),
        (b'{"model": NaN}', "JSON decode error"),
        (b"[" * 600 + b"]" * 600, "JSON decode error"),
        (b"[]", "Input should be a JSON object"),
        (b"\xff", "JSON decode error"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(api: JobsApi, content: bytes, message: str) -> None:
    assert mistakes(api.http.post(JOBS, content=content))[""].startswith(message)


def test_text_with_nul_is_refused_where_it_is(api: JobsApi) -> None:
    assert mistakes(api.create(body(tags=["a", "b\0"]))) == {"tags.1": "text must not contain NUL"}
    assert mistakes(api.create(body("rl", {"stop": ["\0"]}))) == {"config.stop.0": "text must not contain NUL"}
    assert api.new(name=r"a\u0000")["name"] == r"a\u0000"


def test_nothing_of_a_refused_request_is_kept(api: JobsApi) -> None:
    before = api.http.get(JOBS).json()["total"]
    assert api.create(body(model="gpt")).status_code == 422
    assert api.http.get(JOBS).json()["total"] == before
