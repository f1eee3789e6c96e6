"""What a GRPO job reports: the metrics of every reinforcement-learning job, and a few of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import pstdev

import attrs

from tinker_jobs.grpo.groups import PromptGroup
from tinker_jobs.grpo.settings import GRPOSettings
from tinker_jobs.protocol import EventType
from tinker_jobs.rl.history import History
from tinker_jobs.rl.rollouts import Rollout, RolloutGroup
from tinker_jobs.worker.run import JobRun


@attrs.frozen(kw_only=True)
class _Drawing:
    """See `tinker_jobs.rl.history.Drawing`."""

    synced_version: int
    num_syncs: int
    generation_step: int
    num_pending: int


class Report:
    """The events of a job between its beginning and its end, apart from checkpoints."""

    def __init__(self, run: JobRun, settings: GRPOSettings, num_steps: int) -> None:
        self._run = run
        self._settings = settings
        self._num_steps = num_steps
        self._history = History(run.spec.metrics, run.first_step)
        self._num_syncs = 0
        self._synced_version = -1

    def begin(self) -> None:
        """The job starts, or goes on."""
        self._run.emit(
            EventType.TRAINING_START,
            f"training for {self._num_steps} steps from step {self._run.first_step}",
            data={**self._settings.asdict(), "num_steps": self._num_steps},
            artifacts=self._artifacts(),
        )

    def published(self, version: int) -> None:
        """Rollout workers have new weights."""
        self._num_syncs += 1
        self._synced_version = version

    def step(self, step: int, groups: Sequence[PromptGroup], *, learned: bool, num_pending: int) -> None:
        """An optimizer step is complete. ``num_pending`` prompts are under way or answered beyond its own."""
        rollouts = tuple(rollout for group in groups for rollout in _rollouts(group))
        metrics = self._history.add_step(
            RolloutGroup(step=step, version=min(group.version for group in groups), rollouts=rollouts),
            _Drawing(
                synced_version=self._synced_version,
                num_syncs=self._num_syncs,
                generation_step=step + math.ceil(num_pending / self._settings.num_prompts),
                num_pending=num_pending,
            ),
        )
        message = f"step {step} of {self._num_steps}: reward {metrics['train/reward'][0]:.4f}"
        if not learned:
            message += "; the weights stay as they are: no completion was better than another of its prompt"
        positions = sorted(group.asked.position for group in groups)
        self._run.emit(
            EventType.STEP_COMPLETE, message, metrics=metrics, data={"step": step, "prompt_positions": positions}
        )

    def end(self, *, num_lost_workers: int) -> None:
        """The job is complete."""
        self._run.emit(
            EventType.TRAINING_END,
            f"trained for {self._num_steps} steps",
            metrics={**self._history.summary(), "train/rollout_workers_lost": num_lost_workers},
            artifacts=self._artifacts(),
        )

    def _artifacts(self) -> dict[str, object]:
        return {**self._run.refs.artifacts(), "execution_mode": self._settings.execution_mode}


def _rollouts(group: PromptGroup) -> Iterator[Rollout]:
    rewards = [one.reward for one in group.completions]
    of_group = {
        "train/reward_std_in_group": pstdev(rewards),
        "train/prompts_without_signal": float(min(rewards) == max(rewards)),
    }
    for one in group.completions:
        metrics = {**one.metrics, **of_group, "train/completion_tokens": float(len(one.tokens))}
        yield Rollout(turns=(), reward=one.reward, metrics=metrics)
