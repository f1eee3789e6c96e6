"""What a client may ask for: the three kinds of job, with every field, default, constraint and message of the manifest.

Field order, types and defaults are those of https://docs.dreadnode.io/ ("Manifest reference"); the three evaluation
fields of `TinkerRLJobConfig` and the wording of the rules are those of the client ``dreadnode`` 2.0.52.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tinker_jobs.errors import JobRequestError, Mistake

CHECKPOINT_SCHEME = "tinker://"
"""What a ``model`` begins with that is a checkpoint."""
Count = Annotated[int, Field(ge=1)]
"""An integer of at least 1."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Record(BaseModel):
    # What a client sends is honoured or refused, never passed over.
    model_config = ConfigDict(extra="forbid", frozen=True)


class CapabilityRef(_Record):
    """A versioned capability: what the model is to be trained for; here, its system prompt."""

    name: str
    version: str


class DatasetRef(_Record):
    """A versioned dataset."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class RewardRecipe(_Record):
    """A server-side reward by name."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)


class WorldRewardPolicy(_Record):
    """How the turns of a live episode are rewarded: a preset by name, or components in ``params.components``."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)


class TinkerSFTJobConfig(_Record):
    """Supervised fine-tuning."""

    dataset_ref: DatasetRef | None = None
    trajectory_dataset_refs: list[DatasetRef] = Field(default_factory=list)
    eval_dataset_ref: DatasetRef | None = None
    max_sequence_length: Count | None = None
    batch_size: Count | None = None
    gradient_accumulation_steps: Count | None = None
    learning_rate: Positive | None = None
    steps: Count | None = None
    epochs: Count | None = None
    lora_rank: Count | None = None
    lora_alpha: Count | None = None
    checkpoint_interval: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dataset_ref is None and not self.trajectory_dataset_refs:
            raise ValueError("Tinker SFT jobs require dataset_ref or at least one trajectory_dataset_ref")
        return self


class TinkerRLJobConfig(_Record):
    """Reinforcement learning on prompts, live worlds, or recorded trajectories."""

    algorithm: Literal["importance_sampling", "ppo"]
    task_ref: str | None = None
    world_manifest_id: str | None = None
    world_runtime_id: str | None = None
    world_agent_name: str | None = None
    world_goal: str | None = None
    prompt_dataset_ref: DatasetRef | None = None
    trajectory_dataset_refs: list[DatasetRef] = Field(default_factory=list)
    reward_recipe: RewardRecipe | None = None
    world_reward: WorldRewardPolicy | None = None
    execution_mode: Literal["sync", "one_step_off_async", "fully_async"] = "sync"
    prompt_split: str | None = None
    steps: Count | None = None
    lora_rank: Count | None = None
    max_turns: Count | None = None
    max_episode_steps: Count | None = None
    num_rollouts: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    weight_sync_interval: Count | None = None
    max_steps_off_policy: Count | None = None
    max_new_tokens: Count | None = None
    temperature: NotNegative | None = None
    stop: list[str] | None = None
    checkpoint_interval: Count | None = None
    eval_dataset_ref: DatasetRef | None = None
    eval_interval: Count | None = None
    eval_max_rollouts: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for wrong, message in self._rules():
            if wrong:
                raise ValueError(message)
        return self

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        no_input = self.prompt_dataset_ref is None and not self.trajectory_dataset_refs
        is_async, budget = self.execution_mode != "sync", self.max_steps_off_policy
        knobs = self.eval_interval is not None or self.eval_max_rollouts is not None
        return (
            (
                self.world_runtime_id is not None and self.world_manifest_id is None,
                "world_manifest_id is required when world_runtime_id is provided",
            ),
            (
                self.world_agent_name is not None and self.world_runtime_id is None,
                "world_runtime_id is required when world_agent_name is provided",
            ),
            (
                no_input and self.world_manifest_id is None,
                "Tinker RL jobs require prompt_dataset_ref, world_manifest_id, or at least one trajectory_dataset_ref",
            ),
            (is_async and budget is None, "max_steps_off_policy is required for async execution modes"),
            (
                self.execution_mode == "one_step_off_async" and budget != 1,
                "max_steps_off_policy must be 1 for one_step_off_async execution mode",
            ),
            (
                knobs and self.eval_dataset_ref is None,
                "eval_interval / eval_max_rollouts require eval_dataset_ref",
            ),
        )


class RayGRPOJobConfig(_Record):
    """Group-relative policy optimization with rollout workers on a Ray cluster."""

    algorithm: Literal["grpo"] = "grpo"
    task_ref: str
    prompt_dataset_ref: DatasetRef
    reward_recipe: RewardRecipe | None = None
    execution_mode: Literal["async", "colocated", "distributed"] = "async"
    max_turns: Count | None = None
    max_episode_steps: Count | None = None
    num_rollouts: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    num_rollout_workers: Count | None = None
    buffer_size: Count | None = None
    checkpoint_interval: Count | None = None


class _CreateJobRequest(_Record):
    name: str | None = None
    model: str
    project_ref: str | None = None
    run_ref: str | None = None
    capability_ref: CapabilityRef
    tags: list[str] = Field(default_factory=list)


class CreateTinkerSFTJobRequest(_CreateJobRequest):
    """A supervised job on the Tinker API."""

    backend: Literal["tinker"]
    trainer_type: Literal["sft"]
    config: TinkerSFTJobConfig


class CreateTinkerRLJobRequest(_CreateJobRequest):
    """A reinforcement-learning job on the Tinker API."""

    backend: Literal["tinker"]
    trainer_type: Literal["rl"]
    config: TinkerRLJobConfig


class CreateRayGRPOJobRequest(_CreateJobRequest):
    """A GRPO job whose rollouts run on a Ray cluster."""

    backend: Literal["ray"]
    trainer_type: Literal["rl"]
    config: RayGRPOJobConfig


CreateJobRequest = CreateTinkerSFTJobRequest | CreateTinkerRLJobRequest | CreateRayGRPOJobRequest
REQUEST_KINDS: dict[tuple[str, str], type[CreateJobRequest]] = {
    ("tinker", "sft"): CreateTinkerSFTJobRequest,
    ("tinker", "rl"): CreateTinkerRLJobRequest,
    ("ray", "rl"): CreateRayGRPOJobRequest,
}
"""Requests by (backend, trainer_type)."""


def parse(request: Mapping[str, Any]) -> CreateJobRequest:
    """A request by its backend and trainer type; raises `JobRequestError` with all mistakes."""
    kind = REQUEST_KINDS.get((str(request.get("backend")), str(request.get("trainer_type"))))
    if kind is None:
        known = ", ".join(f"{backend}/{trainer_type}" for backend, trainer_type in REQUEST_KINDS)
        message = f"backend and trainer_type must be one of {known}"
        raise JobRequestError([Mistake.in_body(message, "backend")])
    try:
        return kind.model_validate(request)
    except ValidationError as error:
        raise JobRequestError(mistakes_of(error, "body")) from error


def mistakes_of(error: ValidationError, place: str) -> list[Mistake]:
    """What pydantic found, below a place such as ``body``."""
    return [
        # What our own rules say is the whole message; pydantic puts a word of its own before it.
        Mistake(loc=(place, *found["loc"]), msg=found["msg"].removeprefix("Value error, "), type=found["type"])
        for found in error.errors(include_url=False, include_input=False, include_context=False)
    ]


def as_sent(request: CreateJobRequest) -> dict[str, Any]:
    """What the client set, in JSON's types."""
    return request.model_dump(mode="json", exclude_unset=True)
