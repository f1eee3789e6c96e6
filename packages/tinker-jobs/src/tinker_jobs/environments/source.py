"""Rollouts from tasks done in environments."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import chain

import attrs

from tinker_core.plugins import Plugins
from tinker_core.rewards import EnvironmentPlugin
from tinker_jobs.environments.checking import (
    EnvironmentParams,
    choose_provider,
    read_params,
    read_verification,
)
from tinker_jobs.environments.place import Place, PlaceError
from tinker_jobs.errors import JobFailedError
from tinker_jobs.requests import TinkerRLJobConfig
from tinker_jobs.rl.advantages import Baseline, advantages, split_baseline
from tinker_jobs.rl.prompt_rows import Prompt, PromptReader, find_prompts
from tinker_jobs.rl.prompts import messages_of
from tinker_jobs.rl.rollouts import Policy, Rollout, Turn
from tinker_jobs.rl.settings import RLSettings
from tinker_jobs.rows import PromptRow
from tinker_jobs.worker.run import JobRun
from tinker_jobs.worlds.turns import Replies, Sample, gather_episodes

_INPUTS = ("env_inputs", "inputs")


@attrs.define(kw_only=True)
class Attempt:
    """One try at a task."""

    samples: list[Sample] = attrs.field(factory=list)
    passed: bool | None = None
    """None when the environment failed."""
    error: str | None = None

    def reward(self, params: EnvironmentParams) -> float:
        """What it is worth."""
        return params.reward_if_true if self.passed else params.reward_if_false


class EnvironmentSource:
    """Each step tries the tasks of some rows; a try's one reward is what all of its turns were worth."""

    def __init__(
        self,
        run: JobRun,
        settings: RLSettings,
        params: EnvironmentParams,
        baseline: Baseline,
        prompts: Sequence[Prompt],
    ) -> None:
        assert run.refs.task is not None
        self._run = run
        self._settings = settings
        self._params = params
        self._baseline = baseline
        self._prompts = prompts
        self._task = run.refs.task.content
        self._provider = _provider_of(run)
        self._verification = read_verification(self._task)
        self._replies = Replies.of_job(run, settings)
        self._places = asyncio.Semaphore(params.max_concurrent)

    @classmethod
    def open(cls, run: JobRun, config: TinkerRLJobConfig) -> EnvironmentSource:
        """The tasks of a job; blocks. Raises `JobFailedError`, and `RewardError` where the recipe cannot judge."""
        recipe = config.reward_recipe
        if recipe is None or run.refs.task is None or run.refs.prompt_dataset is None:
            raise JobFailedError("rollouts in environments need reward_recipe, task_ref and prompt_dataset_ref")
        if run.refs.eval_dataset is not None or run.refs.trajectory_datasets:
            raise JobFailedError(f"{recipe.name} has no use for eval_dataset_ref and trajectory_dataset_refs")
        settings = RLSettings.of(config)
        baseline, own = split_baseline(recipe.params)
        params = read_params(recipe.name, own, _max_turns(config))
        dataset, reader = run.refs.prompt_dataset, PromptReader(run, settings.max_new_tokens)
        prompts = reader.read(find_prompts(dataset, config.prompt_split), settings.max_prompts, str(dataset))
        return cls(run, settings, params, baseline, prompts)

    @property
    def steps_per_pass(self) -> int:
        """Steps in which every prompt is asked once."""
        return self._settings.steps_per_pass(len(self._prompts))

    async def collect(self, step: int, policy: Policy) -> tuple[Rollout, ...]:
        """See `RolloutSource`; raises `JobFailedError` when every environment failed."""
        sizes, prompts = self._settings.group_sizes, self._settings.prompts_of(step, self._prompts)
        tries = [self._try(prompt, policy) for prompt, size in zip(prompts, sizes, strict=True) for _ in range(size)]
        attempts = iter(await gather_episodes(tries))
        groups = [[next(attempts) for _ in range(size)] for size in sizes]
        self._report_failures(step, list(chain(*groups)))
        return self._rollouts(groups)

    async def evaluate(self, policy: Policy) -> Mapping[str, float]:
        """Nothing: `open` refuses evaluation datasets."""
        return {}

    def _rollouts(self, groups: Sequence[Sequence[Attempt]]) -> tuple[Rollout, ...]:
        judged = [[attempt for attempt in group if attempt.passed is not None] for group in groups]
        judged = [group for group in judged if group]
        rewards = [[attempt.reward(self._params) for attempt in group] for group in judged]
        values = advantages(rewards, self._baseline)
        of_attempt = {id(one): value for one, value in zip(chain(*judged), chain(*values), strict=True)}
        return tuple(self._rollout(attempt, of_attempt.get(id(attempt))) for attempt in chain(*groups))

    def _rollout(self, attempt: Attempt, advantage: float | None) -> Rollout:
        turns: tuple[Turn, ...] = ()
        if advantage is not None:
            turns = tuple(sample.turn(advantage) for sample in attempt.samples if sample.completion)
        return Rollout(
            turns=turns,
            reward=attempt.reward(self._params),
            metrics={
                "reward/passed": float(attempt.passed is True),
                "env/turns": float(len(attempt.samples)),
                "env/error": float(attempt.passed is None),
            },
        )

    def _report_failures(self, step: int, attempts: Sequence[Attempt]) -> None:
        errors = [attempt.error for attempt in attempts if attempt.error is not None]
        if len(errors) == len(attempts):
            raise JobFailedError(f"all {len(errors)} environments of step {step} failed: {errors[0]}")
        if errors:
            message = f"{len(errors)} of {len(attempts)} environments of step {step} failed: {errors[0]}"
            self._run.log(message, level="warning", step=step)

    async def _try(self, prompt: Prompt, policy: Policy) -> Attempt:
        attempt = Attempt()
        async with self._places:
            limit = asyncio.timeout(self._params.timeout_s)
            try:
                async with (
                    limit,
                    Place(self._provider, self._task, _inputs(prompt.row), self._params.timeout_s) as place,
                ):
                    await self._play(attempt, place, prompt, policy)
                    attempt.passed = await place.verify(self._verification)
            except PlaceError as error:
                attempt.passed, attempt.error = None, str(error)
            except TimeoutError:
                if not limit.expired():
                    raise
                # A verdict stands, however long the environment takes to close.
                if attempt.passed is None and attempt.samples:
                    attempt.passed = False
                elif attempt.passed is None:
                    attempt.error = f"{self._provider.name}: no environment within {self._params.timeout_s:g} seconds"
        return attempt

    async def _play(self, attempt: Attempt, place: Place, prompt: Prompt, policy: Policy) -> None:
        messages = messages_of(prompt.row, self._run.refs)
        while len(attempt.samples) < self._params.max_turns:
            sample = await self._replies.draw(policy, messages, prompt.row.tools)
            if sample is None:
                return  # the context is full; what was done is judged
            attempt.samples.append(sample)
            observation = await place.act(sample.text)
            if observation.finished:
                return
            messages += [
                {"role": "assistant", "content": sample.text},
                {"role": "user", "content": observation.text or "(no output)"},
            ]


def _provider_of(run: JobRun) -> EnvironmentPlugin:
    assert run.refs.task is not None
    return choose_provider(run.refs.task.content, Plugins.load(*run.spec.plugins).environments())


def _max_turns(config: TinkerRLJobConfig) -> int | None:
    """What the request itself says, turns and steps of the environment being the same here."""
    bounds = [bound for bound in (config.max_turns, config.max_episode_steps) if bound is not None]
    return min(bounds, default=None)


def _inputs(row: PromptRow) -> Mapping[str, object]:
    """What a row has for its environment."""
    for name in _INPUTS:
        found = row.content.get(name)
        if isinstance(found, Mapping):
            return {str(key): value for key, value in found.items()}
    return {}
