"""Reinforcement-learning jobs: rollouts from wherever the job has them, optimizer steps, checkpoints, evaluations."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import Protocol, runtime_checkable

import tinker
from tinker import types

from tinker_jobs.environments.names import ENVIRONMENT_RECIPES
from tinker_jobs.errors import JobFailedError
from tinker_jobs.protocol import EventType
from tinker_jobs.requests import TinkerRLJobConfig
from tinker_jobs.rl.history import History
from tinker_jobs.rl.prompt_source import PromptSource
from tinker_jobs.rl.rollouts import Policy, RolloutGroup, RolloutSource
from tinker_jobs.rl.schedule import Plan, Schedule
from tinker_jobs.rl.settings import DEFAULT_EVAL_INTERVAL, RLSettings
from tinker_jobs.worker.run import JobRun, checkpoint_name


@runtime_checkable
class Passes(Protocol):
    """A source that has so much to ask."""

    @property
    def steps_per_pass(self) -> int:
        """Steps in which everything is asked once."""


def run_rl(run: JobRun) -> None:
    """Do what a `TinkerRLJobConfig` says. Raises `JobFailedError` and `CancelledJobError`."""
    asyncio.run(_Training(run).run())


def open_source(run: JobRun, config: TinkerRLJobConfig) -> RolloutSource:
    """Where a job's rollouts come from; blocks. Raises `JobFailedError`."""
    if run.refs.world is not None:
        if run.refs.prompt_dataset is not None or run.refs.trajectory_datasets:
            raise JobFailedError(
                "a job acts in a live world or answers prompts, not both: "
                "leave out world_manifest_id, or prompt_dataset_ref and trajectory_dataset_refs"
            )
        from tinker_jobs.worlds.source import WorldSource

        return WorldSource.open(run, config)
    for name in ("world_goal", "world_reward"):
        if getattr(config, name) is not None:
            raise JobFailedError(f"{name} is about live worlds: add world_manifest_id or leave it out")
    if config.reward_recipe is not None and config.reward_recipe.name in ENVIRONMENT_RECIPES:
        from tinker_jobs.environments.source import EnvironmentSource

        return EnvironmentSource.open(run, config)
    return PromptSource.open(run, config)


class _Training:
    """One process of a job."""

    def __init__(self, run: JobRun) -> None:
        config = run.request.config
        assert isinstance(config, TinkerRLJobConfig)
        self._run = run
        self._config = config
        self._settings = RLSettings.of(config)
        self._history = History(run.spec.metrics, run.first_step)
        self._adam = types.AdamParams(learning_rate=self._settings.learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)

    async def run(self) -> None:
        """The whole job, or what is left of it."""
        source = await asyncio.to_thread(open_source, self._run, self._config)
        num_steps = self._settings.num_steps or (source.steps_per_pass if isinstance(source, Passes) else 1)
        client = await asyncio.to_thread(self._run.open_training_client, rank=self._config.lora_rank)
        self._announce(num_steps)
        schedule = Schedule(
            self._plan(num_steps), source, refresh=lambda version: _publish(client, version), report=self._report_eval
        )
        async with aclosing(schedule.groups()) as groups:
            async for group in groups:
                self._run.check_cancelled()
                await self._train(client, group)
                self._report_step(group, schedule, num_steps)
                await self._save(client, group.step, num_steps)
                self._run.check_cancelled()
        await asyncio.to_thread(self._run.save_checkpoint, client, "final", num_steps)
        self._run.emit(
            EventType.TRAINING_END,
            f"trained for {num_steps} steps",
            metrics=self._history.summary(),
            artifacts=self._artifacts(),
        )

    def _plan(self, num_steps: int) -> Plan:
        chosen = self._settings
        interval = None
        if self._run.refs.eval_dataset is not None:
            interval = chosen.eval_interval or min(DEFAULT_EVAL_INTERVAL, num_steps)
        return Plan(
            first_step=self._run.first_step,
            num_steps=num_steps,
            groups_ahead=chosen.groups_ahead,
            weight_sync_interval=chosen.weight_sync_interval,
            max_staleness=chosen.max_steps_off_policy,
            eval_interval=interval,
        )

    async def _train(self, client: tinker.TrainingClient, group: RolloutGroup) -> None:
        turns = [turn for rollout in group.rollouts for turn in rollout.turns]
        if not turns:
            raise JobFailedError("No RL rollouts were generated for training")
        # An advantage of 0 adds nothing to the gradient, only to the time.
        data = [turn.datum() for turn in turns if turn.advantage != 0]
        if not data:
            self._run.log(
                f"step {group.step} leaves the weights as they are: no rollout was better than another",
                step=group.step,
            )
            return
        passed = client.forward_backward(data, self._loss())
        stepped = client.optim_step(self._adam)
        await passed
        await stepped

    def _loss(self) -> types.LossFnType:
        return "ppo" if self._settings.algorithm == "ppo" else "importance_sampling"

    async def _save(self, client: tinker.TrainingClient, step: int, num_steps: int) -> None:
        name = checkpoint_name(step, self._settings.checkpoint_interval, num_steps)
        if name is not None:
            await asyncio.to_thread(self._run.save_checkpoint, client, name, step)

    # --- reporting ----------------------------------------------------------------------------------------------------

    def _announce(self, num_steps: int) -> None:
        chosen = self._settings
        self._run.emit(
            EventType.TRAINING_START,
            f"training for {num_steps} steps from step {self._run.first_step}",
            data={**chosen.asdict(), "num_steps": num_steps},
            artifacts=self._artifacts(),
        )
        for warning in self._warnings(num_steps):
            self._run.log(warning, level="warning")

    def _warnings(self, num_steps: int) -> list[str]:
        """What a job can do and hardly wants to."""
        chosen, found = self._settings, []
        bound = chosen.max_steps_off_policy
        if self._run.refs.world is None and chosen.temperature == 0:
            found.append("at temperature 0 all completions of a prompt are the same; only differences teach anything")
        if bound is not None and chosen.weight_sync_interval > bound + 1:
            found.append(
                f"weights are refreshed more often than weight_sync_interval={chosen.weight_sync_interval} says, "
                f"to keep max_steps_off_policy={bound}"
            )
        if chosen.eval_interval is not None and chosen.eval_interval > num_steps:
            found.append(f"there is no evaluation in {num_steps} steps with eval_interval={chosen.eval_interval}")
        return found

    def _report_step(self, group: RolloutGroup, schedule: Schedule, num_steps: int) -> None:
        metrics = self._history.add_step(group, schedule)
        reward = metrics["train/reward"][0]
        message = f"step {group.step} of {num_steps}: reward {reward:.4f}"
        self._run.emit(EventType.STEP_COMPLETE, message, metrics=metrics, data={"step": group.step})

    def _report_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        reward = metrics.get("eval/reward")
        message = f"evaluated the policy of step {step}" + ("" if reward is None else f": reward {reward:.4f}")
        reported = self._history.add_evaluation(step, metrics)
        self._run.emit(EventType.EVAL_COMPLETE, message, metrics=reported, data={"step": step})

    def _artifacts(self) -> dict[str, object]:
        return {**self._run.refs.artifacts(), "execution_mode": self._settings.execution_mode}


async def _publish(client: tinker.TrainingClient, version: int) -> Policy:
    # One target that moves: the server would keep the weights of every snapshot until the session ends.
    sampler = await client.save_weights_and_get_sampling_client(kind="inflight")
    return Policy(sampler=sampler, version=version)
