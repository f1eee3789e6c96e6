"""What rollout workers are given and what they give back; Ray passes all of it on."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from tinker_jobs.rl.prompt_rows import Prompt


@attrs.frozen(kw_only=True)
class Asked:
    """A prompt in its place."""

    position: int
    """Its place in the order of the whole run, from 0."""
    prompt: Prompt


@attrs.frozen(kw_only=True)
class PublishedPolicy:
    """Weights that rollout workers sample from."""

    version: int
    """Optimizer steps that these weights have behind them, at least."""
    sampler: str = attrs.field(repr=False)
    """The SDK's handle of a sampling client, without its API key."""


@attrs.frozen(kw_only=True)
class Completion:
    """One answer, judged."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the tokens, under the weights that drew them."""
    reward: float
    metrics: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class PromptGroup:
    """All completions of one prompt."""

    asked: Asked
    version: int
    """The oldest policy that drew any of it; see `PublishedPolicy.version`."""
    completions: tuple[Completion, ...]
