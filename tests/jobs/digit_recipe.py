"""A plugin with recipes for tests: one that every completion gets a part of, a slow one, and one with a bug."""

from __future__ import annotations

import time
from collections.abc import Callable

from tinker_core.hookspecs import hookimpl
from tinker_core.rewards import Judged, Reward, RewardError, RewardRecipePlugin

judged_here: list[Judged] = []
"""What was judged in this process, in no order within a step."""


def asked() -> list[str]:
    """The prompts of that."""
    return [str(judged.row["prompt"]) for judged in judged_here]


def score(judged: Judged) -> Reward:
    """The share of digits in the completion."""
    if "baseline" in judged.params:
        raise RewardError("a recipe does not see the baseline")
    judged_here.append(judged)
    digits = sum(character.isdigit() for character in judged.completion)
    share = digits / max(1, len(judged.completion))
    return Reward(value=share, metrics={"reward/length": float(len(judged.completion))})


def score_slowly(judged: Judged) -> Reward:
    """As `score`, after ``seconds``: a verifier that waits for something outside."""
    seconds = judged.params["seconds"]
    assert isinstance(seconds, int | float)
    time.sleep(seconds)
    return score(judged)


def divide(judged: Judged) -> Reward:
    """A recipe with a bug, on rows that divide by zero."""
    return Reward(value=1.0 / float(str(judged.row["divisor"])))


@hookimpl
def tinker_register_reward_recipe(register: Callable[[RewardRecipePlugin], None]) -> None:
    register(RewardRecipePlugin(name="digits", score=score))
    register(RewardRecipePlugin(name="slow_digits", score=score_slowly))
    register(RewardRecipePlugin(name="divide", score=divide))
