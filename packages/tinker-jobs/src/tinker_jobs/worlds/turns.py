"""What the turns of an episode have in common wherever it is played: drawing replies, and what each was worth."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import attrs
from tinker import types
from transformers import PreTrainedTokenizerBase

from tinker_jobs.errors import JobFailedError
from tinker_jobs.rendering import render_prompt
from tinker_jobs.rl.rollouts import Policy, Turn
from tinker_jobs.rl.settings import RLSettings
from tinker_jobs.rows import Message
from tinker_jobs.worker.run import JobRun

_T = TypeVar("_T")


@attrs.frozen(kw_only=True)
class Sample:
    """A reply exactly as it was drawn."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    """Without special tokens."""

    def turn(self, advantage: float) -> Turn:
        """What is learned from it."""
        return Turn(prompt=self.prompt, completion=self.completion, logprobs=self.logprobs, advantage=advantage)


@attrs.frozen(kw_only=True)
class Replies:
    """How a policy's replies are drawn."""

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    temperature: float
    stop: tuple[str, ...] = ()
    """Texts that end a reply; nothing for the model's own end."""
    max_context: int | None = None
    """Tokens that the model can take; None when the server does not tell."""

    @classmethod
    def of_job(cls, run: JobRun, settings: RLSettings) -> Replies:
        """As a request says."""
        return cls(
            tokenizer=run.tokenizer,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop=settings.stop_texts(run.tokenizer.eos_token),
            max_context=run.context_length,
        )

    async def draw(
        self, policy: Policy, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> Sample | None:
        """The policy's reply to messages; None when they leave no room in its context for a whole one."""
        prompt = render_prompt(self.tokenizer, messages, tools)
        if self.max_context is not None and len(prompt) + self.max_new_tokens > self.max_context:
            return None
        answer = await policy.sampler.sample(
            prompt=types.ModelInput.from_ints(prompt),
            num_samples=1,
            sampling_params=types.SamplingParams(
                max_tokens=self.max_new_tokens, temperature=self.temperature, stop=list(self.stop) or None
            ),
        )
        sequence = answer.sequences[0]
        completion, logprobs = tuple(sequence.tokens), tuple(sequence.logprobs or ())
        if len(logprobs) != len(completion):
            raise JobFailedError(f"the server gave {len(logprobs)} logprobs for {len(completion)} sampled tokens")
        text = self.tokenizer.decode(list(completion), skip_special_tokens=True)
        assert isinstance(text, str)
        return Sample(prompt=tuple(prompt), completion=completion, logprobs=logprobs, text=text)

    def no_room_error(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> JobFailedError:
        """Why not even the first reply could be drawn."""
        num_tokens = len(render_prompt(self.tokenizer, messages, tools))
        return JobFailedError(
            f"the first prompt has {num_tokens} tokens, which leaves no room for max_new_tokens={self.max_new_tokens} "
            f"in the model's context of {self.max_context}; shorten the prompts, or ask for fewer tokens"
        )


def rewards_to_go(rewards: Sequence[float]) -> list[float]:
    """For each turn, what it and all later ones have earned."""
    total, sums = 0.0, []
    for reward in reversed(rewards):
        total += reward
        sums.append(total)
    return sums[::-1]


def turn_means(episodes: Sequence[Sequence[float]]) -> list[float]:
    """For each turn, the mean over all episodes, in which one that has ended counts as 0.

    So the only episode that lives to see a turn is still compared with those that did not.
    """
    longest = max(map(len, episodes), default=0)
    return [sum(one[turn] for one in episodes if turn < len(one)) / len(episodes) for turn in range(longest)]


def advantages(episodes: Sequence[Sequence[float]], *, has_baseline: bool) -> list[list[float]]:
    """What the turns of several episodes were worth beyond what was to be expected, from their rewards.

    A single episode has nothing to be compared with: its rewards-to-go are taken as they are.
    """
    sums = [rewards_to_go(rewards) for rewards in episodes]
    if not has_baseline or len(sums) < 2:
        return sums
    means = turn_means(sums)
    return [[value - mean for value, mean in zip(one, means, strict=False)] for one in sums]


async def gather_episodes(episodes: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """What several episodes at once come to; the first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(episode) for episode in episodes]
    except ExceptionGroup as error:
        raise error.exceptions[0] from error
    return [task.result() for task in tasks]
