"""What a request for live worlds may not say. Free of torch and the SDK: the server checks requests with it."""

from __future__ import annotations

from tinker_core.rewards import RewardError
from tinker_jobs.errors import Mistake
from tinker_jobs.requests import TinkerRLJobConfig
from tinker_jobs.worlds.shaping import check_world_reward

_NOT_WITH_A_WORLD = (
    "prompt_dataset_ref",
    "trajectory_dataset_refs",
    "prompt_split",
    "reward_recipe",
    "eval_dataset_ref",
)
_ONLY_WITH_A_WORLD = ("world_goal", "world_reward")


def world_mistakes(config: TinkerRLJobConfig) -> list[Mistake]:
    """What is wrong with a request's fields about worlds; nothing it says may go unheard."""
    found = []
    if config.world_manifest_id is None:
        given = (name for name in _ONLY_WITH_A_WORLD if getattr(config, name) is not None)
        found += [Mistake.in_config(f"world_manifest_id is required when {name} is provided", name) for name in given]
    else:
        given = (name for name in _NOT_WITH_A_WORLD if getattr(config, name))
        found += [
            Mistake.in_config(f"{name} has no use in a live world: leave it or world_manifest_id out", name)
            for name in given
        ]
    if config.world_reward is not None:
        try:
            check_world_reward(config.world_reward)
        except RewardError as error:
            found.append(Mistake.in_config(str(error), "world_reward"))
    return found
