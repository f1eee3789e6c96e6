"""What a policy did and how good it was, and where that comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs
import numpy as np
import tinker
from tinker import types


@attrs.frozen(kw_only=True)
class Policy:
    """Weights that samples are drawn from."""

    sampler: tinker.SamplingClient
    version: int
    """Optimizer steps that these weights have behind them."""


@attrs.frozen(kw_only=True)
class Turn:
    """One completion, and how much better than expected it was."""

    prompt: Sequence[int]
    completion: Sequence[int]
    logprobs: Sequence[float]
    """Of the completion's tokens, under the policy that drew them."""
    advantage: float

    def datum(self) -> types.Datum:
        """For ``importance_sampling`` and ``ppo``: nothing is learned from the prompt."""
        before = len(self.prompt) - 1
        tokens = [*self.prompt, *self.completion]
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_numpy(np.array(tokens[1:], np.int64)),
                "logprobs": _floats([0.0] * before + list(self.logprobs)),
                "advantages": _floats([0.0] * before + [self.advantage] * len(self.completion)),
            },
        )


def _floats(values: list[float]) -> types.TensorData:
    return types.TensorData.from_numpy(np.array(values, np.float32))


@attrs.frozen(kw_only=True)
class Rollout:
    """One completion, or one episode of several turns."""

    turns: tuple[Turn, ...]
    reward: float
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    """Averaged over a step's rollouts, by name."""


@attrs.frozen(kw_only=True)
class RolloutGroup:
    """What one optimizer step learns from."""

    step: int
    """The optimizer step that it was collected for, from 1."""
    version: int
    """The oldest policy that drew any of it; see `Policy.version`."""
    rollouts: tuple[Rollout, ...]


class RolloutSource(Protocol):
    """Where rollouts come from: prompts, live worlds, task environments."""

    async def collect(self, step: int, policy: Policy) -> tuple[Rollout, ...]:
        """The rollouts of one step, with advantages. Equal steps ask for equal prompts, so that a step can be done
        again after a crash. Several steps may be collected at once. Raises `JobFailedError`."""

    async def evaluate(self, policy: Policy) -> Mapping[str, float]:
        """Greedy rollouts on the evaluation dataset: metrics by name; nothing when there is none."""
