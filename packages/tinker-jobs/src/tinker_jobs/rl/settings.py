"""The settings of a reinforcement-learning job, with our choices where the request leaves them open.

=========================  =================================================================================
``steps``                  as many as it takes to ask every prompt once; 1 in live worlds
``num_rollouts``           8, or ``batch_size`` where that is larger: completions per step
``batch_size``             8, or ``num_rollouts`` where that is smaller: prompts per step, in turn over all rows
``learning_rate``          1e-4; Adam with betas 0.9 and 0.95
``lora_rank``              16, or that of the checkpoint in ``model``
``temperature``            1.0
``max_new_tokens``         128
``weight_sync_interval``   1
``checkpoint_interval``    none: only ``final`` is saved
``eval_interval``          10, or ``steps`` where that is smaller
``eval_max_rollouts``      ``batch_size``
=========================  =================================================================================

Each prompt is answered ``num_rollouts / batch_size`` times; where that leaves a remainder, the first prompts of a step
are answered once more than the others. What a completion's reward is compared with is told in
`tinker_jobs.rl.advantages`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import attrs

from tinker_jobs.requests import TinkerRLJobConfig

DEFAULT_ROLLOUTS = 8
DEFAULT_EVAL_INTERVAL = 10
_Prompt = TypeVar("_Prompt")


@attrs.frozen(kw_only=True)
class RLSettings:
    """What `TinkerRLJobConfig` leaves open, decided."""

    algorithm: str
    execution_mode: str
    num_steps: int | None
    """None for one pass over the prompts."""
    num_prompts: int
    """Prompts per step."""
    num_rollouts: int
    """Completions, or episodes, per step."""
    learning_rate: float
    weight_sync_interval: int
    """Optimizer steps from one refreshment of the policy to the next."""
    max_steps_off_policy: int | None
    """None, in the sync mode only, for as old as the policy gets between two refreshments."""
    max_new_tokens: int
    temperature: float
    stop: tuple[str, ...]
    checkpoint_interval: int | None
    eval_interval: int | None
    eval_max_rollouts: int

    @classmethod
    def of(cls, config: TinkerRLJobConfig) -> RLSettings:
        """The settings that a request asks for."""
        num_rollouts = config.num_rollouts or max(DEFAULT_ROLLOUTS, config.batch_size or 0)
        num_prompts = min(config.batch_size or DEFAULT_ROLLOUTS, num_rollouts)
        return cls(
            algorithm=config.algorithm,
            execution_mode=config.execution_mode,
            num_steps=config.steps,
            num_prompts=num_prompts,
            num_rollouts=num_rollouts,
            learning_rate=config.learning_rate or 1e-4,
            weight_sync_interval=config.weight_sync_interval or 1,
            max_steps_off_policy=config.max_steps_off_policy,
            max_new_tokens=config.max_new_tokens or 128,
            temperature=1.0 if config.temperature is None else config.temperature,
            stop=tuple(config.stop or ()),
            checkpoint_interval=config.checkpoint_interval,
            eval_interval=config.eval_interval,
            eval_max_rollouts=config.eval_max_rollouts or config.batch_size or num_prompts,
        )

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Completions of each prompt of a step."""
        size, remainder = divmod(self.num_rollouts, self.num_prompts)
        return tuple(size + (index < remainder) for index in range(self.num_prompts))

    @property
    def max_prompts(self) -> int | None:
        """Prompts that all steps ask for, beyond which none need be read; None for all that there are."""
        return None if self.num_steps is None else self.num_steps * self.num_prompts

    def steps_per_pass(self, num_prompts: int) -> int:
        """Steps in which each of so many prompts is asked once."""
        return math.ceil(num_prompts / self.num_prompts)

    def prompts_of(self, step: int, prompts: Sequence[_Prompt]) -> list[_Prompt]:
        """Those of a step, counted from 1: all of them in turn, and then from the first one again."""
        first = (step - 1) * self.num_prompts
        return [prompts[(first + index) % len(prompts)] for index in range(self.num_prompts)]

    def stop_texts(self, end: str | None) -> tuple[str, ...]:
        """Texts that end a completion; none where the model's own ``end`` alone does.

        The server takes a request's texts in place of that end, so it stands among them.
        """
        return (*self.stop, end) if self.stop and end else self.stop

    @property
    def groups_ahead(self) -> int:
        """Steps whose rollouts may be drawn before their turn."""
        return 0 if self.execution_mode == "sync" else self.max_steps_off_policy or 1

    def asdict(self) -> dict[str, Any]:
        """For the job's log."""
        return attrs.asdict(self)
