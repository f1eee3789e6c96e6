"""A reward recipe that waits before it answers, as one that asks a sandbox does; a plugin of the job's process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from tinker_core.hookspecs import hookimpl
from tinker_core.rewards import Judged, Reward, RewardRecipePlugin

SHORTEST_S, LONGEST_S = 0.3, 1.0


def score(judged: Judged) -> Reward:
    """The share of digits, after a time that is the row's own and so the same in every mode."""
    time.sleep(random.Random(str(judged.row["prompt"])).uniform(SHORTEST_S, LONGEST_S))
    digits = sum(character.isdigit() for character in judged.completion)
    return Reward(value=digits / max(1, len(judged.completion)))


@hookimpl
def tinker_register_reward_recipe(register: Callable[[RewardRecipePlugin], None]) -> None:
    """Register ``slow_verifier``."""
    register(RewardRecipePlugin(name="slow_verifier", score=score))
