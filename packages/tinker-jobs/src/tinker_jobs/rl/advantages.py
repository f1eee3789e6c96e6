"""How much better than expected a completion was.

``reward_recipe.params.baseline`` chooses what its reward is compared with:

- ``group_mean``, the default: the mean reward of all completions of the same prompt; where a prompt has only one, the
  mean of the step.
- ``batch_mean``: the mean reward of all completions of the step.
- ``none``: nothing; the advantage is the reward itself, as on the hosted platform.

A step of a single completion has nothing to compare it with, so its reward counts as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from statistics import mean
from typing import Any

from tinker_jobs.baselines import take_baseline


class Baseline(StrEnum):
    """What rewards are compared with."""

    GROUP_MEAN = "group_mean"
    BATCH_MEAN = "batch_mean"
    NONE = "none"


def split_baseline(params: Mapping[str, Any]) -> tuple[Baseline, dict[str, Any]]:
    """The baseline that a recipe's parameters ask for, and the recipe's own ones.

    Raises `RewardError` for a baseline that does not exist.
    """
    return take_baseline(params, Baseline)


def advantages(groups: Sequence[Sequence[float]], baseline: Baseline) -> list[list[float]]:
    """Advantages in place of rewards; one group holds the completions of one prompt."""
    rewards = [reward for group in groups for reward in group]
    if baseline is Baseline.NONE or len(rewards) < 2:
        return [list(group) for group in groups]
    # Not `fmean`: of equal rewards it may differ from them by a rounding, and Adam would make a step of that.
    step_mean, by_group = mean(rewards), baseline is Baseline.GROUP_MEAN
    means = [mean(group) if by_group and len(group) > 1 else step_mean for group in groups]
    return [[reward - expected for reward in group] for group, expected in zip(groups, means, strict=True)]
