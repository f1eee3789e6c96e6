"""What each field of the API of training jobs means, and the tests that show it; `jobs_reference` makes a page of it.

Tests are named ``file:test``, where ``file`` stands for ``tests/jobs/test_jobs_<file>.py``.
"""

from __future__ import annotations

Rows = dict[str, tuple[str, ...]]
"""Field -> meaning, and then its tests."""

EVERY_FIELD = "validation:test_every_field_is_kept_and_its_bounds_are_checked"
"""Shows of every field of the three configurations that it is kept as it was sent, and that its bounds hold."""
AROUND = "validation:test_every_field_around_the_config_is_kept_and_checked"
DEMANDED = "validation:test_what_every_job_needs_is_demanded"
LEFT_OUT = "validation:test_what_is_left_out_has_the_defaults_of_the_manifest"
RULE = "validation:test_every_rule_has_its_own_words"
WHOLE_JOB = "api:test_a_job_says_everything_about_itself"
RESOLVED = "api:test_a_job_says_what_its_references_were_resolved_to"
MOVES = "api:test_a_job_moves_as_its_worker_reports"
LINES = "api:test_a_log_is_read_from_any_line"
CATALOG = "catalog:test_the_catalog_tells_what_can_be_trained_and_how"
CONTEXT = "api:test_a_worker_learns_what_a_job_is_about"
CAPTURED = "captures:test_a_captured_request_is_answered_in_the_captured_shape"
SENSELESS = "api:test_a_report_that_makes_no_sense_is_refused"

_PLAIN_LOOP = "sft:test_a_job_does_what_a_plain_loop_does_and_what_peft_does"
_SFT_DEFAULTS = "sft:test_what_was_left_open_has_the_defaults_of_the_reference"
_SFT_REPORT = "sft:test_metrics_and_artifacts_have_every_name_of_the_reference"
_RL_DEFAULTS = "rl:test_what_a_job_leaves_open_is_decided_and_reported"
_BOUND = "rl_async:test_an_asynchronous_job_keeps_its_bound_and_reports_it"
_WORLD = "worlds:test_a_job_trains_in_a_world_and_names_it"
_WORLD_REF = "library:test_a_world_has_its_goal_and_the_prompt_of_its_runtimes_agent_but_no_token"

REQUEST: Rows = {
    "name": ("a name to show", AROUND),
    "model": (
        "a base model that the server trains, or a `tinker://` checkpoint of one that the caller may read",
        AROUND,
        DEMANDED,
        "validation:test_a_model_that_is_not_served_is_refused_with_those_that_are",
        "tenants:test_a_job_may_go_on_from_ones_own_checkpoint_only",
    ),
    "project_ref": (
        "a name that jobs are listed by",
        AROUND,
        "api:test_jobs_are_listed_newest_first_by_page_and_filter",
    ),
    "run_ref": ("kept and shown", AROUND),
    "capability_ref": (
        "a capability of the data directory; its prompt is the system message",
        AROUND,
        DEMANDED,
        "rl:test_the_policy_sees_capability_task_and_row",
    ),
    "tags": ("kept and shown", AROUND, LEFT_OUT),
    "backend": (
        "`tinker`, or `ray` for GRPO, which the server needs Ray for",
        "validation:test_other_pairs_of_backend_and_trainer_are_refused",
        "validation:test_ray_jobs_are_refused_where_ray_is_not_installed",
    ),
    "trainer_type": ("`sft` or `rl`", "validation:test_other_pairs_of_backend_and_trainer_are_refused"),
    "config": ("one of the three below", AROUND, DEMANDED),
}

REFERENCES: Rows = {
    "CapabilityRef": ("`name: str`, `version: str`", AROUND),
    "DatasetRef": ("`name: str`, `version: str`", EVERY_FIELD),
    "RewardRecipe": (
        "`name: str`, `params: dict = {}`",
        EVERY_FIELD,
        "validation:test_reward_recipes_are_checked_by_name_parameters_and_task",
    ),
    "WorldRewardPolicy": (
        "`name: str`, `params: dict = {}`; components go into `params.components`",
        EVERY_FIELD,
        "shaping:test_components_are_put_together_whatever_the_name_and_one_may_come_twice",
    ),
}

SFT: Rows = {
    "dataset_ref": ("what is trained on", _PLAIN_LOOP),
    "trajectory_dataset_refs": (
        "recorded trajectories, trained on as conversations with tools, before `dataset_ref`",
        "validation:test_supervised_jobs_take_trajectories_alone_or_beside_a_dataset",
        _SFT_REPORT,
    ),
    "eval_dataset_ref": ("its loss is measured once after training", _SFT_REPORT),
    "max_sequence_length": (
        "tokens of an example, at most: 2048 when null, never more than the model's context",
        _SFT_DEFAULTS,
        "rendering:test_what_is_too_long_loses_its_end_and_is_dropped_when_nothing_is_left_to_learn",
    ),
    "batch_size": ("examples of one pass: 16 when null", _PLAIN_LOOP, _SFT_DEFAULTS),
    "gradient_accumulation_steps": ("passes of one optimizer step: 1 when null", _PLAIN_LOOP, _SFT_DEFAULTS),
    "learning_rate": ("of Adam: 1e-4 when null", _PLAIN_LOOP, _SFT_DEFAULTS),
    "steps": (
        "optimizer steps, at most; one epoch when `epochs` is null too",
        "sft:test_the_smaller_of_steps_and_epochs_ends_a_job",
    ),
    "epochs": ("passes over the data, at most", "sft:test_the_smaller_of_steps_and_epochs_ends_a_job"),
    "lora_rank": (
        "of the adapter: 16 when null, or that of the checkpoint in `model`",
        _SFT_DEFAULTS,
        "tenants:test_a_job_may_go_on_from_ones_own_checkpoint_only",
    ),
    "lora_alpha": ("divided by the rank it scales the adapter; 32 when null, as without jobs", _PLAIN_LOOP),
    "checkpoint_interval": (
        "optimizer steps between checkpoints: 10 when null; `final` is always saved",
        "sft:test_checkpoints_are_saved_at_every_interval_and_at_the_end",
        _SFT_DEFAULTS,
    ),
}

RL: Rows = {
    "algorithm": ("the loss of the policy", "rl:test_both_algorithms_learn_with_every_baseline"),
    "task_ref": (
        "a task as `name@version`, or by name in its highest version, which is then kept",
        RESOLVED,
        "library:test_a_task_without_a_version_is_the_highest_and_the_job_keeps_it",
    ),
    "world_manifest_id": ("a live world to act in", _WORLD, RESOLVED),
    "world_runtime_id": ("one of the world's runtimes, whose capability acts", _WORLD_REF),
    "world_agent_name": ("an agent of that capability; its entry agent when null", _WORLD_REF),
    "world_goal": ("takes the place of the world's own goal", _WORLD_REF),
    "prompt_dataset_ref": (
        "prompts to answer",
        "rl:test_a_job_learns_what_its_recipe_rewards",
        "rl:test_rows_are_asked_in_turn_and_again_from_the_first",
    ),
    "trajectory_dataset_refs": (
        "recorded trajectories, of which every step is asked as a prompt",
        "rl:test_each_recorded_step_is_asked_as_a_prompt_of_its_own",
    ),
    "reward_recipe": (
        "how completions are rewarded; when null `row_reward_v1`, without prompts `trajectory_imitation_v1`",
        "rl:test_a_job_that_names_no_recipe_gets_that_of_its_data",
        "rl:test_a_job_learns_what_its_recipe_rewards",
    ),
    "world_reward": (
        "how turns in a world are rewarded: `heuristic_v1` when null",
        "worlds:test_a_policy_learns_what_a_world_rewards",
        "shaping:test_the_heuristic_is_all_components_and_takes_a_weight_for_each",
    ),
    "execution_mode": (
        "whether rollouts are drawn in turn, one step ahead, or up to the budget ahead of training",
        _BOUND,
        "rl_async:test_rollouts_are_drawn_while_the_model_trains",
    ),
    "prompt_split": (
        "split of the prompt dataset; `train`, or its only file, when null",
        "library:test_a_dataset_is_read_in_the_split_that_was_asked_for_else_in_train",
    ),
    "steps": (
        "optimizer steps: when null as many as ask every prompt once, and 1 in a world",
        "rl:test_without_steps_every_row_is_asked_as_often_as_any_other",
    ),
    "lora_rank": (
        "of the adapter: 16 when null, or that of the checkpoint in `model`",
        "rl_async:test_asynchronous_jobs_learn_too",
        "tenants:test_a_job_may_go_on_from_ones_own_checkpoint_only",
    ),
    "max_turns": (
        "replies of an episode, at most: 8 in a world when null; prompts have one",
        "worlds:test_an_episode_ends",
        "validation:test_turns_that_nothing_takes_are_refused",
    ),
    "max_episode_steps": (
        "commands of an episode in a world, at most; no bound when null",
        "worlds:test_an_episode_ends",
        "validation:test_turns_that_nothing_takes_are_refused",
    ),
    "num_rollouts": (
        "completions, or episodes, of a step: 8 when null, or `batch_size` if that is more",
        "rl:test_the_rollouts_of_a_step_are_shared_out_among_its_prompts",
        _RL_DEFAULTS,
    ),
    "batch_size": (
        "prompts of a step: 8 when null, never more than `num_rollouts`",
        "rl:test_the_rollouts_of_a_step_are_shared_out_among_its_prompts",
        _RL_DEFAULTS,
    ),
    "learning_rate": ("of Adam: 1e-4 when null", _RL_DEFAULTS),
    "weight_sync_interval": (
        "optimizer steps from one refreshment of the sampling policy to the next: 1 when null",
        "rl_async:test_in_turn_the_policy_is_refreshed_before_every_so_many_steps",
        "rl_async:test_the_bound_goes_before_the_interval",
    ),
    "max_steps_off_policy": (
        "optimizer steps that a rollout may be older than the policy that learns from it",
        "rl_async:test_no_rollout_is_older_than_the_bound_when_it_is_used",
        _BOUND,
    ),
    "max_new_tokens": ("tokens of a completion, at most: 128 when null", _RL_DEFAULTS),
    "temperature": ("of sampling: 1 when null", _RL_DEFAULTS),
    "stop": ("texts that end a completion", "rl:test_a_completion_ends_at_a_stop_text"),
    "checkpoint_interval": (
        "optimizer steps between checkpoints; only `final` when null",
        "rl_async:test_a_cancelled_job_goes_on_from_its_checkpoint_when_it_is_resumed",
    ),
    "eval_dataset_ref": ("prompts that are answered greedily now and then", "rl_async:test_evaluations_are_greedy"),
    "eval_interval": (
        "optimizer steps between evaluations: 10 when null, or `steps` if that is less",
        "rl_async:test_an_evaluation_is_of_the_policy_that_draws_the_step",
    ),
    "eval_max_rollouts": (
        "prompts of an evaluation, at most: `batch_size` when null",
        "rl_async:test_evaluations_are_greedy",
    ),
}

_SIZES = "grpo:test_prompts_and_completions_of_a_step_follow_from_each_other"
_REFUSED = "grpo:test_what_no_job_could_honour_is_refused_by_field"
_LOST = "grpo:test_a_job_that_loses_a_worker_loses_no_step_and_no_prompt"
_MODES = "grpo:test_every_mode_learns_with_every_baseline"
GRPO: Rows = {
    "algorithm": ("there is no other", LEFT_OUT),
    "task_ref": (
        "its instruction is told to the policy; its section `grpo` sets what has no field here",
        "library:test_the_references_of_a_grpo_job_are_frozen_too",
    ),
    "prompt_dataset_ref": (
        "prompts to answer",
        "grpo:test_every_prompt_is_asked_once_per_epoch_in_an_order_of_its_own",
    ),
    "reward_recipe": ("how completions are rewarded: `row_reward_v1` when null", _MODES),
    "execution_mode": (
        "`async`: rollouts go on while the model trains; `colocated`, `distributed`: they take turns",
        _MODES,
    ),
    "max_turns": ("1; a prompt is answered once", _REFUSED),
    "max_episode_steps": ("1; a prompt is answered once", _REFUSED),
    "num_rollouts": ("completions of a step: 4 for each prompt when null", _SIZES, _REFUSED),
    "batch_size": ("prompts of a step: 8 when null, or a fourth of `num_rollouts`", _SIZES),
    "learning_rate": ("of Adam: 4e-5 when null", _MODES),
    "num_rollout_workers": ("Ray actors that draw rollouts: 2 when null", _LOST),
    "buffer_size": (
        "prompts under way or waiting to be trained on, at most: twice `batch_size` when null",
        "grpo:test_makers_wait_until_the_learner_has_taken_items",
        _REFUSED,
    ),
    "checkpoint_interval": (
        "optimizer steps between checkpoints; only `final` when null",
        "grpo:test_a_resumed_job_does_the_steps_that_are_left",
    ),
}

RULES: Rows = {
    "Tinker SFT jobs require dataset_ref or at least one trajectory_dataset_ref": ("sft", RULE),
    "world_manifest_id is required when world_runtime_id is provided": ("rl", RULE),
    "world_runtime_id is required when world_agent_name is provided": ("rl", RULE),
    "Tinker RL jobs require prompt_dataset_ref, world_manifest_id, or at least one trajectory_dataset_ref": (
        "rl",
        RULE,
        "validation:test_reinforcement_learning_needs_no_prompts_where_there_is_other_input",
    ),
    "max_steps_off_policy is required for async execution modes": ("rl", RULE),
    "max_steps_off_policy must be 1 for one_step_off_async execution mode": (
        "rl",
        RULE,
        "validation:test_one_step_off_takes_a_budget_of_one",
    ),
    "eval_interval / eval_max_rollouts require eval_dataset_ref": ("rl", RULE),
}

JOB: Rows = {
    "id": ("a UUID", WHOLE_JOB),
    "organization_id": ("the same for all jobs of a server", WHOLE_JOB),
    "workspace_id": ("the same for all jobs of a server", WHOLE_JOB),
    "status": (
        "`queued`, `running`, `completed`, `failed` or `cancelled`; `pending` may be asked for and never occurs",
        MOVES,
        "api:test_jobs_are_listed_newest_first_by_page_and_filter",
    ),
    "name": ("as sent", WHOLE_JOB),
    "backend": ("as sent", WHOLE_JOB),
    "trainer_type": ("as sent", WHOLE_JOB),
    "algorithm": ("null for SFT", RESOLVED, LEFT_OUT),
    "model": ("as sent", WHOLE_JOB),
    "project_ref": ("as sent", WHOLE_JOB),
    "run_ref": ("as sent", WHOLE_JOB),
    "dataset_ref": ("as resolved", WHOLE_JOB),
    "trajectory_dataset_refs": (
        "as resolved",
        "validation:test_supervised_jobs_take_trajectories_alone_or_beside_a_dataset",
    ),
    "task_ref": ("`name@version`, as resolved", RESOLVED),
    "world_manifest_id": ("as sent", RESOLVED),
    "world_runtime_id": ("as sent", RESOLVED),
    "world_agent_name": ("as sent", RESOLVED),
    "world_goal": ("as sent", RESOLVED),
    "prompt_dataset_ref": ("as resolved", RESOLVED),
    "capability": (
        "`name`, `version`, `runtime_digest` (SHA-256 over its files at submission), `artifact_id` (null)",
        WHOLE_JOB,
        "library:test_the_digest_of_a_capability_changes_with_any_name_or_byte_of_its_files",
    ),
    "config": ("exactly as sent", EVERY_FIELD, CAPTURED),
    "metrics": ("numbers, and series beside their `steps` or `eval/steps`", MOVES, _SFT_REPORT),
    "artifacts": ("what the job has made, such as checkpoints", MOVES, _SFT_REPORT),
    "tags": ("as sent", WHOLE_JOB),
    "error": ("why it failed", "api:test_a_worker_may_report_a_failure"),
    "created_at": ("submission, in UTC", WHOLE_JOB),
    "created_by": ("id of the user who submitted it", WHOLE_JOB),
    "created_by_email": ("made up from the user's name; nothing is sent to it", WHOLE_JOB),
    "created_by_user": ("the same user", WHOLE_JOB, "tenants:test_a_listing_shows_ones_own_jobs"),
    "started_at": ("start of its process", MOVES),
    "completed_at": ("when it completed, failed or was cancelled", MOVES),
    "cancel_requested_at": (
        "when it was asked to stop",
        "lifecycle:test_a_running_job_is_cancelled_between_steps_and_asking_twice_changes_nothing",
    ),
}

LINE: Rows = {
    "timestamp": ("in UTC", LINES),
    "level": ("`debug`, `info`, `warning` or `error`", LINES),
    "message": ("a line for people", LINES),
    "data": ("more of it", LINES),
    "number": ("its place, to go on after; not in the manifest", LINES),
    "event_type": ("what happened; not in the manifest", LINES),
    "metrics": ("what was measured; not in the manifest", LINES),
}

CATALOG_MODEL: Rows = {
    "tinker_id": ("what `model` takes", CATALOG),
    "display_name": ("its last part", CATALOG),
    "family": ("`model_type` of the model's configuration, or `unknown`", CATALOG),
    "type": ("`dense` or `moe`", CATALOG),
    "size_b": ("billions of parameters in its files; 0 if there are none here", CATALOG),
    "context_length": ("tokens", CATALOG),
    "extended_context": ("false", CATALOG),
    "supported_algorithms": ("`sft`; if the server samples from it `importance_sampling` and `ppo`", CATALOG),
    "pricing": ("null", CATALOG),
}

PROGRESS: Rows = {
    "event_type": ("what happened; moves the job", MOVES, SENSELESS),
    "message": ("line of the log; the event's name when null", LINES),
    "level": ("of the line", LINES, SENSELESS),
    "metrics": ("added to the job's; those of `training_end` replace whole series", MOVES, SENSELESS),
    "data": ("more for the log", LINES),
    "artifacts": ("merged into the job's", MOVES),
    "error": ("why it failed", "api:test_a_worker_may_report_a_failure"),
}

ENDPOINTS: Rows = {
    "POST {jobs}": ("create a job: 201", CAPTURED),
    "GET {jobs}": (
        "`page`, `page_size` (to 100), `status`, `backend`, `trainer_type`, `project_ref` → `items`, newest first",
        "api:test_jobs_are_listed_newest_first_by_page_and_filter",
        "api:test_a_listing_by_what_there_is_not_is_refused",
    ),
    "GET {jobs}/{job_id}": ("a job", WHOLE_JOB, "api:test_a_job_that_does_not_exist_is_not_found"),
    "POST {jobs}/{job_id}/cancel": (
        "stop it, at the next step if it runs; 409 if it has ended",
        "api:test_a_queued_job_is_cancelled_at_once_and_can_be_retried",
        "lifecycle:test_a_running_job_is_cancelled_between_steps_and_asking_twice_changes_nothing",
    ),
    "POST {jobs}/{job_id}/retry": (
        "run it again from the beginning; 409 unless it failed or was cancelled",
        "api:test_a_queued_job_is_cancelled_at_once_and_can_be_retried",
        "lifecycle:test_a_job_is_retried_from_the_beginning_under_its_id_and_keeps_its_log",
    ),
    "GET {jobs}/{job_id}/logs": ("`after` a number → `items`, oldest first", LINES),
    "GET {jobs}/{job_id}/logs/stream": (
        "server-sent events, after `after` or `Last-Event-ID`: `log` with each line, and at last `status` with the job",
        "api:test_a_log_is_followed_to_the_end_of_its_job",
        "api:test_a_server_that_stops_ends_its_streams",
        "api:test_a_quiet_stream_is_kept_alive",
    ),
    "GET {jobs}/{job_id}/artifacts": ("`artifacts`", MOVES),
    "GET {jobs}/{job_id}/files/{name}": (
        "a file that the artifacts name, such as a plot",
        "api:test_a_file_of_a_job_is_sent_as_what_it_is",
        "api:test_nothing_else_of_a_job_is_sent",
    ),
    "GET {jobs}/{job_id}/rl-context": ("for workers elsewhere: what the references hold", CONTEXT),
    "POST {jobs}/{job_id}/progress": ("for workers elsewhere: see below", MOVES, SENSELESS),
    "GET /api/v1/training/catalog": (
        "`limit` (to 100), `query`, `family`, `algorithm`, `min_size_b`, `max_size_b` → `models`, `total`, `limit`",
        CATALOG,
        "catalog:test_the_catalog_refuses_what_it_does_not_know",
    ),
    "GET /api/v1/user": ("the caller", CAPTURED),
    "GET /api/v1/org/{organization}": (
        "the organization",
        CAPTURED,
        "catalog:test_other_places_do_not_exist",
    ),
    "GET /api/v1/org/{organization}/ws": (
        "a list of its one workspace",
        "catalog:test_clients_find_the_organization_its_workspace_and_projects",
    ),
    "GET /api/v1/org/{organization}/ws/{workspace}": ("the workspace", CAPTURED),
    "GET /api/v1/org/{organization}/ws/{workspace}/projects": (
        "a list of the default project",
        "catalog:test_clients_find_the_organization_its_workspace_and_projects",
    ),
    "GET /api/v1/org/{organization}/ws/{workspace}/projects/{project}": (
        "a project; every name is one",
        "catalog:test_clients_find_the_organization_its_workspace_and_projects",
    ),
}
