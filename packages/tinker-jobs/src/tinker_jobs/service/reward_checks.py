"""What a request's reward needs, and what it leaves without use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tinker_core.plugins import Plugins
from tinker_core.rewards import RewardError
from tinker_jobs.environments.checking import check_environment_job
from tinker_jobs.environments.names import AGENT, ENVIRONMENT_RECIPES
from tinker_jobs.errors import Mistake
from tinker_jobs.grpo import advantages as grpo_advantages
from tinker_jobs.refs import FrozenTask
from tinker_jobs.requests import (
    CreateRayGRPOJobRequest,
    CreateTinkerRLJobRequest,
    RayGRPOJobConfig,
    RewardRecipe,
    TinkerRLJobConfig,
)
from tinker_jobs.rl import advantages as rl_advantages

_RECIPE = "reward_recipe"
_Config = TinkerRLJobConfig | RayGRPOJobConfig


def recipe_mistakes(
    request: CreateTinkerRLJobRequest | CreateRayGRPOJobRequest, task: FrozenTask | None, plugins: Plugins
) -> Iterator[Mistake]:
    """Why a request's recipe cannot judge. ``task`` is the one that the request names, None if there is none."""
    recipe, config = request.config.reward_recipe, request.config
    if recipe is None:
        return
    is_grpo = isinstance(request, CreateRayGRPOJobRequest)
    if recipe.name in ENVIRONMENT_RECIPES:
        if not is_grpo:  # which refuses them whatever is installed
            yield from _environment_mistakes(config, recipe, task, plugins)
        return
    known = plugins.reward_recipes()
    found = known.get(recipe.name)
    if found is None:
        names = ", ".join(sorted([*known, *(ENVIRONMENT_RECIPES if plugins.environments() else ())]))
        message = f"Unknown reward recipe: {recipe.name[:200]}; known recipes: {names}"
        yield Mistake.in_config(message, _RECIPE, "name")
        return
    split = grpo_advantages.split_baseline if is_grpo else rl_advantages.split_baseline
    yield from _try(lambda: found.check_params(split(recipe.params)[1]), "params")
    if found.needs_task and config.task_ref is None:
        yield Mistake.in_config(f"{recipe.name} requires task_ref", "task_ref")


def _environment_mistakes(
    config: _Config, recipe: RewardRecipe, task: FrozenTask | None, plugins: Plugins
) -> Iterator[Mistake]:
    providers = plugins.environments()
    if not providers:
        message = (
            f"{recipe.name} needs an environment to do tasks in, and no plugin of this server provides one; "
            "install a plugin that implements tinker_register_environment"
        )
        yield Mistake.in_config(message, _RECIPE, "name")
    for field in ("task_ref", "prompt_dataset_ref"):
        if getattr(config, field) is None:
            yield Mistake.in_config(f"{recipe.name} requires {field}", field)
    if providers and task is not None:
        content: Mapping[str, Any] = task.content
        yield from _try(
            lambda: check_environment_job(
                recipe.name, rl_advantages.split_baseline(recipe.params)[1], content, providers
            )
        )


def turn_mistakes(config: TinkerRLJobConfig) -> Iterator[Mistake]:
    """Turns that nothing takes: a prompt is answered once."""
    if config.world_manifest_id is not None:
        return
    is_agent = config.reward_recipe is not None and config.reward_recipe.name == AGENT
    for name in ("max_turns", "max_episode_steps"):
        if (getattr(config, name) or 1) > 1 and not is_agent:
            yield Mistake.in_config(f"{name} above 1 requires world_manifest_id or the reward recipe {AGENT}", name)


def _try(check: Callable[[], None], *loc: str) -> Iterator[Mistake]:
    try:
        check()
    except RewardError as error:
        yield Mistake.in_config(str(error), _RECIPE, *loc)
