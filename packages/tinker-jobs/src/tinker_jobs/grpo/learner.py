"""The learner: advantages, the clipped loss on the server, one optimizer step, and the new policy."""

from __future__ import annotations

from collections.abc import Sequence

import tinker
from tinker import types

from tinker_jobs.grpo.advantages import group_advantages
from tinker_jobs.grpo.groups import PromptGroup, PublishedPolicy
from tinker_jobs.grpo.settings import GRPOSettings
from tinker_jobs.rl.rollouts import Turn

LOSS: types.LossFnType = "ppo"
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
"""Bounds of the ratio to the policy that drew a token; beyond them it teaches nothing."""


class Learner:
    """Trains a model; its methods block."""

    def __init__(self, client: tinker.TrainingClient, settings: GRPOSettings) -> None:
        self._client = client
        self._baseline = settings.baseline
        self._adam = types.AdamParams(
            learning_rate=settings.learning_rate,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.01,
            grad_clip_norm=1.0,
        )

    def train(self, groups: Sequence[PromptGroup]) -> bool:
        """Do an optimizer step on prompts and their completions; whether there was anything to learn.

        Where nothing is better than anything else there is no gradient, and the model stays as it is: Adam would go on
        in the direction of earlier steps.
        """
        data = self._data(groups)
        if not data:
            return False
        gradient = self._client.forward_backward(data, LOSS, CLIP)
        update = self._client.optim_step(self._adam)
        gradient.result()
        update.result()
        return True

    def publish(self, version: int) -> PublishedPolicy:
        """The model as it is now, for rollout workers; ``version`` is the number of steps that it has behind it."""
        # One target that moves, so that the server keeps one set of weights rather than one for each step.
        sampler = self._client.save_weights_and_get_sampling_client(kind="inflight").result()
        return PublishedPolicy(version=version, sampler=sampler.get_sampler_handle())

    def _data(self, groups: Sequence[PromptGroup]) -> list[types.Datum]:
        # The server's losses are sums; this makes them means over the step's completion tokens, whatever their number.
        num_tokens = _num_tokens(groups)
        data = []
        for group in groups:
            advantages = group_advantages([one.reward for one in group.completions], self._baseline)
            for completion, advantage in zip(group.completions, advantages, strict=True):
                if advantage == 0 or not completion.tokens:
                    continue
                turn = Turn(
                    prompt=group.asked.prompt.tokens,
                    completion=completion.tokens,
                    logprobs=completion.logprobs,
                    advantage=advantage / num_tokens,
                )
                data.append(turn.datum())
        return data


def _num_tokens(groups: Sequence[PromptGroup]) -> int:
    return sum(len(completion.tokens) for group in groups for completion in group.completions)
