"""A rollout worker: answers prompts as a client of the Tinker API, and judges its answers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import tinker
from tinker import types
from transformers import PreTrainedTokenizerBase

from tinker_core.plugins import Plugins
from tinker_core.rewards import RewardError
from tinker_jobs.errors import JobFailedError
from tinker_jobs.grpo.groups import Asked, Completion, PromptGroup, PublishedPolicy
from tinker_jobs.rl.prompts import Judge


@attrs.frozen(kw_only=True)
class WorkerSpec:
    """Everything that a rollout worker is made of; it reads no files, so that it can be anywhere."""

    tokenizer: PreTrainedTokenizerBase = attrs.field(repr=False)
    api_key: str = attrs.field(repr=False)
    plugins: tuple[str, ...]
    """Plugins to load for recipes; they must be installed where the worker runs."""
    recipe: str
    params: Mapping[str, Any]
    verification: Mapping[str, Any] | None
    group_size: int
    max_new_tokens: int
    temperature: float


class RolloutWorker:
    """Becomes a Ray actor. Only what its methods raise tells anything, so its constructor does nothing."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._policy_version: int | None = None

    async def start(self) -> str:
        """Load what judging needs; where it runs. Raises `JobFailedError`."""
        recipe = Plugins.load(*self._spec.plugins).reward_recipes().get(self._spec.recipe)
        if recipe is None:
            raise JobFailedError(f"Unknown reward recipe: {self._spec.recipe} (on {socket.gethostname()})")
        try:
            recipe.check_params(self._spec.params)
        except RewardError as error:
            raise JobFailedError(str(error)) from error
        self._judge = Judge(recipe=recipe, params=self._spec.params, verification=self._spec.verification)
        # One thread: recipes are not asked to stand several, and other prompts' answers are drawn meanwhile.
        self._judging = ThreadPoolExecutor(1, thread_name_prefix="reward")
        return f"{socket.gethostname()}/{os.getpid()}"

    async def roll_out(self, asked: Asked, policy: PublishedPolicy) -> PromptGroup:
        """Answer a prompt and judge the answers. Raises `JobFailedError`, or an error of the Tinker API."""
        response = await self._sampler(policy).sample(
            types.ModelInput.from_ints(list(asked.prompt.tokens)),
            num_samples=self._spec.group_size,
            # The seed makes a prompt that is asked again, after a crash, draw the same from the same weights.
            sampling_params=types.SamplingParams(
                max_tokens=self._spec.max_new_tokens, temperature=self._spec.temperature, seed=asked.position
            ),
        )
        loop = asyncio.get_running_loop()
        completions = [
            await loop.run_in_executor(self._judging, self._complete, asked, sequence)
            for sequence in response.sequences
        ]
        return PromptGroup(asked=asked, version=policy.version, completions=tuple(completions))

    def _sampler(self, policy: PublishedPolicy) -> tinker.SamplingClient:
        if self._policy_version != policy.version:
            self._newest = tinker.SamplingClient.from_sampler_handle(policy.sampler, api_key=self._spec.api_key)
            self._policy_version = policy.version
        return self._newest

    def _complete(self, asked: Asked, sequence: types.SampledSequence) -> Completion:
        if sequence.logprobs is None:
            raise JobFailedError("the sampler gave no log-probabilities of its own tokens")
        text = str(self._spec.tokenizer.decode(sequence.tokens, skip_special_tokens=True))
        reward = self._judge(text, asked.prompt.row, asked.prompt.where)
        return Completion(
            tokens=tuple(sequence.tokens),
            logprobs=tuple(sequence.logprobs),
            reward=reward.value,
            metrics=dict(reward.metrics),
        )
