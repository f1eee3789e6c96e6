"""How much better a completion is than the others of its prompt.

``reward_recipe.params.baseline`` chooses what a reward is compared with; what comes of that is divided by the standard
deviation of the group's rewards (the one of the group itself, with G below the fraction):

- ``group_mean``, the default: the mean of the group, the completion's own reward included;
- ``leave_one_out``: the mean of the others.

A group whose rewards are all equal says nothing about what is better. Its advantages are 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from statistics import fmean, pstdev
from typing import Any

from tinker_jobs.baselines import take_baseline


class Baseline(StrEnum):
    """What rewards are compared with."""

    GROUP_MEAN = "group_mean"
    LEAVE_ONE_OUT = "leave_one_out"


def split_baseline(params: Mapping[str, Any]) -> tuple[Baseline, dict[str, Any]]:
    """The baseline that a recipe's parameters ask for, and the recipe's own ones.

    Raises `RewardError` for a baseline that does not exist.
    """
    return take_baseline(params, Baseline, " on backend ray")


def group_advantages(rewards: Sequence[float], baseline: Baseline) -> list[float]:
    """Advantages of one prompt's completions, of which there are at least two."""
    # Compared before anything is computed: of equal rewards the mean may differ by a rounding, and the division would
    # make that as large as any other difference.
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean, deviation = fmean(rewards), pstdev(rewards)
    # r - mean(others) is (r - mean(all)) * G / (G - 1).
    scale = len(rewards) / (len(rewards) - 1) if baseline is Baseline.LEAVE_ONE_OUT else 1.0
    return [(reward - mean) * scale / deviation for reward in rewards]
