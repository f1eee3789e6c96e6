"""Rollouts of one completion each: prompts of a dataset or of recorded trajectories, judged by a reward recipe."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from statistics import fmean

import attrs
from tinker import types

from tinker_core.plugins import Plugins
from tinker_core.rewards import Reward, RewardError
from tinker_jobs.errors import JobFailedError
from tinker_jobs.recipes import DEFAULT_RECIPE
from tinker_jobs.requests import RewardRecipe, TinkerRLJobConfig
from tinker_jobs.rl.advantages import Baseline, advantages, split_baseline
from tinker_jobs.rl.offline import OFFLINE_RECIPE, find_actions
from tinker_jobs.rl.prompt_rows import FoundRow, Prompt, PromptReader, find_prompts
from tinker_jobs.rl.prompts import Judge
from tinker_jobs.rl.rollouts import Policy, Rollout, Turn
from tinker_jobs.rl.settings import RLSettings
from tinker_jobs.worker.run import JobRun

MAX_JUDGING_THREADS = 64
"""Completions that are judged at once: recipes may wait long for something outside."""


@attrs.frozen(kw_only=True)
class Completion:
    """A sampled answer and its reward."""

    prompt: Prompt
    sequence: types.SampledSequence
    reward: Reward

    def rollout(self, advantage: float) -> Rollout:
        """For training."""
        logprobs = self.sequence.logprobs
        if logprobs is None:
            raise JobFailedError("the sampler gave no log-probabilities of its own tokens")
        turn = Turn(
            prompt=self.prompt.tokens,
            completion=self.sequence.tokens,
            logprobs=logprobs,
            advantage=advantage,
        )
        return Rollout(
            turns=(turn,) if turn.completion else (), reward=self.reward.value, metrics=dict(self.reward.metrics)
        )


class PromptSource:
    """Completions of prompts, a few of each step's, in turn over all prompts."""

    def __init__(
        self,
        run: JobRun,
        settings: RLSettings,
        judge: Judge,
        baseline: Baseline,
        prompts: Sequence[Prompt],
        eval_prompts: Sequence[Prompt],
    ) -> None:
        self._tokenizer = run.tokenizer
        self._settings = settings
        self._judge = judge
        self._baseline = baseline
        self._prompts = prompts
        self._eval_prompts = eval_prompts
        self._stop = list(settings.stop_texts(run.tokenizer.eos_token)) or None
        self._threads = ThreadPoolExecutor(MAX_JUDGING_THREADS, thread_name_prefix="reward")

    @classmethod
    def open(cls, run: JobRun, config: TinkerRLJobConfig) -> PromptSource:
        """Read what a job asks for; blocks. Raises `JobFailedError`."""
        settings = RLSettings.of(config)
        judge, baseline = open_judge(run, config)
        reader = PromptReader(run, settings.max_new_tokens)
        prompts = reader.read(_rows(run, config), settings.max_prompts, ", ".join(_sources(run)))
        eval_prompts: Sequence[Prompt] = ()
        if run.refs.eval_dataset is not None:
            rows = find_prompts(run.refs.eval_dataset)
            eval_prompts = reader.read(rows, settings.eval_max_rollouts, str(run.refs.eval_dataset))
        return cls(run, settings, judge, baseline, prompts, eval_prompts)

    @property
    def steps_per_pass(self) -> int:
        """Steps in which every prompt is asked once."""
        return self._settings.steps_per_pass(len(self._prompts))

    async def collect(self, step: int, policy: Policy) -> tuple[Rollout, ...]:
        """See `RolloutSource`."""
        prompts, sizes = self._settings.prompts_of(step, self._prompts), self._settings.group_sizes
        groups = await asyncio.gather(*map(partial(self._complete, policy), prompts, sizes))
        rewards = [[completion.reward.value for completion in group] for group in groups]
        pairs = zip(chain(*groups), chain(*advantages(rewards, self._baseline)), strict=True)
        return tuple(completion.rollout(advantage) for completion, advantage in pairs)

    async def evaluate(self, policy: Policy) -> Mapping[str, float]:
        """See `RolloutSource`."""
        if not self._eval_prompts:
            return {}
        groups = await asyncio.gather(
            *(self._complete(policy, prompt, 1, temperature=0.0) for prompt in self._eval_prompts)
        )
        found = [completion.reward for group in groups for completion in group]
        rewards = [reward.value for reward in found]
        failed = [reward.metrics.get("reward/extraction_failed", 0.0) for reward in found]
        return {
            "eval/reward": fmean(rewards),
            "eval/reward_max": max(rewards),
            "eval/reward_min": min(rewards),
            "eval/extraction_failed_rate": fmean(failed),
        }

    async def _complete(
        self, policy: Policy, prompt: Prompt, num_samples: int, temperature: float | None = None
    ) -> list[Completion]:
        response = await policy.sampler.sample(
            types.ModelInput.from_ints(list(prompt.tokens)),
            num_samples=num_samples,
            sampling_params=types.SamplingParams(
                max_tokens=self._settings.max_new_tokens,
                temperature=self._settings.temperature if temperature is None else temperature,
                stop=self._stop,
            ),
        )
        loop = asyncio.get_running_loop()
        rewards = await asyncio.gather(
            *(
                loop.run_in_executor(self._threads, self._reward, prompt, sequence.tokens)
                for sequence in response.sequences
            )
        )
        return [
            Completion(prompt=prompt, sequence=sequence, reward=reward)
            for sequence, reward in zip(response.sequences, rewards, strict=True)
        ]

    def _reward(self, prompt: Prompt, tokens: Sequence[int]) -> Reward:
        """Judge a completion; runs in a thread."""
        completion = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return self._judge(str(completion), prompt.row, prompt.where)


def open_judge(run: JobRun, config: TinkerRLJobConfig) -> tuple[Judge, Baseline]:
    """The recipe of a job, and what its rewards are compared with. Raises `JobFailedError`."""
    chosen = config.reward_recipe or RewardRecipe(name=default_recipe(config))
    recipe = Plugins.load(*run.spec.plugins).reward_recipes().get(chosen.name)
    if recipe is None:
        raise JobFailedError(f"Unknown reward recipe: {chosen.name}")
    try:
        baseline, params = split_baseline(chosen.params)
        recipe.check_params(params)
    except RewardError as error:
        raise JobFailedError(str(error)) from error
    verification = None if run.refs.task is None else run.refs.task.verification
    return Judge(recipe=recipe, params=params, verification=verification), baseline


def default_recipe(config: TinkerRLJobConfig) -> str:
    """The recipe of a job that names none."""
    offline = config.prompt_dataset_ref is None and bool(config.trajectory_dataset_refs)
    return OFFLINE_RECIPE if offline else DEFAULT_RECIPE


def _rows(run: JobRun, config: TinkerRLJobConfig) -> Iterator[FoundRow | None]:
    if run.refs.prompt_dataset is not None:
        yield from find_prompts(run.refs.prompt_dataset, config.prompt_split)
    if run.refs.trajectory_datasets:
        yield from find_actions(run.refs.trajectory_datasets, run.tokenizer)


def _sources(run: JobRun) -> Iterator[str]:
    if run.refs.prompt_dataset is not None:
        yield str(run.refs.prompt_dataset)
    yield from map(str, run.refs.trajectory_datasets)
