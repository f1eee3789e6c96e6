"""The settings of a GRPO job, with our choices where the request leaves them open or has no field for them.

=========================  =================================================================================
``batch_size``             prompts per optimizer step: 8, or a fourth of ``num_rollouts``
``num_rollouts``           completions per optimizer step: 4 for each prompt; a multiple of ``batch_size``
``learning_rate``          4e-5; Adam with betas 0.9 and 0.95, weight decay 0.01, gradients clipped to norm 1
``num_rollout_workers``    2
``buffer_size``            prompts that are under way or wait to be trained on, at most: twice ``batch_size``
``checkpoint_interval``    none: only ``final`` is saved
``reward_recipe``          ``row_reward_v1``
=========================  =================================================================================

The learning rate is that of an adapter; training all weights would want a tenth and less. There is no KL term: the
request has no field for its strength, and the clipped loss bounds each step by itself.

For the rest the task's file may have a mapping ``grpo``:

=========================  =================================================================================
``epochs``                 passes over the prompts: 1
``max_new_tokens``         512, or half of the model's context where that is smaller
``temperature``            1.0, because the loss compares with the probabilities of the policy itself
``lora_rank``              16, or that of the checkpoint in ``model``
=========================  =================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from tinker_jobs.environments.names import ENVIRONMENT_RECIPES
from tinker_jobs.errors import JobRequestError, Mistake
from tinker_jobs.grpo.advantages import Baseline, split_baseline
from tinker_jobs.recipes import DEFAULT_RECIPE
from tinker_jobs.refs import FrozenTask
from tinker_jobs.requests import RayGRPOJobConfig, RewardRecipe

TASK_SECTION = "grpo"
"""Key of a task's file."""
COUNTS = ("epochs", "max_new_tokens", "lora_rank")
DEFAULT_PROMPTS, DEFAULT_GROUP, DEFAULT_WORKERS = 8, 4, 2
MAX_NEW_TOKENS = 512


@attrs.frozen(kw_only=True)
class GRPOSettings:
    """What `RayGRPOJobConfig` leaves open, decided."""

    execution_mode: str
    num_prompts: int
    """Prompts per optimizer step."""
    group_size: int
    """Completions per prompt."""
    num_workers: int
    buffer_size: int
    """Prompts that are under way or wait to be trained on, at most."""
    learning_rate: float
    checkpoint_interval: int | None
    recipe: str
    params: Mapping[str, Any]
    """The recipe's own parameters."""
    baseline: Baseline
    epochs: int
    max_new_tokens: int | None
    """None for our choice, which depends on the model's context."""
    temperature: float
    lora_rank: int | None

    @classmethod
    def of(cls, config: RayGRPOJobConfig, task: FrozenTask | None) -> GRPOSettings:
        """The settings that a request and its task ask for.

        Raises `JobRequestError` with every mistake, and `RewardError` for an unknown baseline.
        """
        mistakes = list(find_mistakes(config, task))
        if mistakes:
            raise JobRequestError(mistakes)
        recipe = config.reward_recipe or RewardRecipe(name=DEFAULT_RECIPE)
        baseline, params = split_baseline(recipe.params)
        num_prompts, num_rollouts = _sizes(config)
        section = _section(task)
        return cls(
            execution_mode=config.execution_mode,
            num_prompts=num_prompts,
            group_size=num_rollouts // num_prompts,
            num_workers=config.num_rollout_workers or DEFAULT_WORKERS,
            buffer_size=config.buffer_size or 2 * num_prompts,
            learning_rate=config.learning_rate or 4e-5,
            checkpoint_interval=config.checkpoint_interval,
            recipe=recipe.name,
            params=params,
            baseline=baseline,
            epochs=section.get("epochs", 1),
            max_new_tokens=section.get("max_new_tokens"),
            temperature=float(section.get("temperature", 1.0)),
            lora_rank=section.get("lora_rank"),
        )

    @property
    def runs_ahead(self) -> bool:
        """Whether prompts are answered while the model trains on others."""
        return self.execution_mode == "async"

    def max_new_tokens_in(self, context: int | None) -> int:
        """Tokens of a completion, at most, of a model with a context of so many."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return MAX_NEW_TOKENS if context is None else min(MAX_NEW_TOKENS, max(1, context // 2))

    def asdict(self) -> dict[str, Any]:
        """For the job's log."""
        return attrs.asdict(self)


def _sizes(config: RayGRPOJobConfig) -> tuple[int, int]:
    """Prompts and completions of a step."""
    if config.batch_size is not None:
        return config.batch_size, config.num_rollouts or config.batch_size * DEFAULT_GROUP
    if config.num_rollouts is not None:
        return max(1, config.num_rollouts // DEFAULT_GROUP), config.num_rollouts
    return DEFAULT_PROMPTS, DEFAULT_PROMPTS * DEFAULT_GROUP


def find_mistakes(config: RayGRPOJobConfig, task: FrozenTask | None) -> Iterator[Mistake]:
    """What is wrong with a request and its task, beyond what each field says by itself."""
    num_prompts, num_rollouts = _sizes(config)
    if num_rollouts % num_prompts or num_rollouts < 2 * num_prompts:
        message = (
            f"num_rollouts must be a multiple of batch_size ({num_prompts}) and at least twice that: every prompt of a "
            f"step gets equally many completions, which are compared with each other; got {num_rollouts}"
        )
        yield Mistake.in_config(message, "num_rollouts")
    if config.buffer_size is not None and config.buffer_size < num_prompts:
        message = f"buffer_size must be at least batch_size ({num_prompts}), or no step could ever be filled"
        yield Mistake.in_config(message, "buffer_size")
    for name in ("max_turns", "max_episode_steps"):
        if (getattr(config, name) or 1) > 1:
            message = f"{name} must be 1 on backend ray, where a prompt is answered once; use backend tinker for more"
            yield Mistake.in_config(message, name)
    if config.reward_recipe is not None and config.reward_recipe.name in ENVIRONMENT_RECIPES:
        message = f"{config.reward_recipe.name} acts in an environment, which backend ray does not offer; use tinker"
        yield Mistake.in_config(message, "reward_recipe", "name")
    yield from _task_mistakes(task)


def _section(task: FrozenTask | None) -> Any:  # noqa: ANN401 - what a file says, which may be anything
    section = None if task is None else task.content.get(TASK_SECTION)
    return {} if section is None else section


def _task_mistakes(task: FrozenTask | None) -> Iterator[Mistake]:
    section = _section(task)
    if not isinstance(section, Mapping):
        yield Mistake.in_config(f"task {task}: {TASK_SECTION} must be a mapping, got {section!r:.60}", "task_ref")
        return
    for name, value in section.items():
        wrong = _what_is_wrong(name, value)
        if wrong:
            yield Mistake.in_config(f"task {task}: {TASK_SECTION}.{name} {wrong}, got {value!r:.60}", "task_ref")


def _what_is_wrong(name: str, value: Any) -> str | None:  # noqa: ANN401 - of a file
    if name in COUNTS:
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return None if is_count else "must be an integer of at least 1"
    if name == "temperature":
        # At 0 all completions of a prompt are equal, and nothing can be learned from that.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number and 0 < value < math.inf else "must be a number above 0"
    return f"is unknown (known: {', '.join((*COUNTS, 'temperature'))})"
