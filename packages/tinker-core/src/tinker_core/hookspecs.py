"""The hooks a plugin may implement. Hooks are for wiring at start and for observing, never inside the token loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pluggy

if TYPE_CHECKING:
    from tinker_core.extensions import CommandPlugin, ServicePlugin
    from tinker_core.interfaces import ExecutorPlugin, LossPlugin, OptimizerPlugin, SamplerPlugin, TrainerPlugin
    from tinker_core.rewards import EnvironmentPlugin, RewardRecipePlugin
    from tinker_core.types import RequestError, RequestType

PROJECT = "tinker_core"
"""The pluggy project and the entry-point group."""

_F = TypeVar("_F", bound=Callable[..., Any])

hookspec = cast("Callable[[_F], _F]", pluggy.HookspecMarker(PROJECT))
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the implementation of the hook it is named after."""


@hookspec
def tinker_register_trainer(register: Callable[[TrainerPlugin], None]) -> None:
    """Register trainers, selected with ``--backend``."""


@hookspec
def tinker_register_sampler(register: Callable[[SamplerPlugin], None]) -> None:
    """Register samplers, selected with ``--sampler``."""


@hookspec
def tinker_register_executor(register: Callable[[ExecutorPlugin], None]) -> None:
    """Register ways to start the worker processes of a base model."""


@hookspec
def tinker_register_loss(register: Callable[[LossPlugin], None]) -> None:
    """Register losses that clients can name in ``forward_backward``."""


@hookspec
def tinker_register_optimizer(register: Callable[[OptimizerPlugin], None]) -> None:
    """Register optimizer families that clients can name in ``create_model``."""


@hookspec
def tinker_register_reward_recipe(register: Callable[[RewardRecipePlugin], None]) -> None:
    """Register reward recipes for hosted reinforcement-learning jobs."""


@hookspec
def tinker_register_environment(register: Callable[[EnvironmentPlugin], None]) -> None:
    """Register providers of environments that the policy of a job does its task in."""


@hookspec
def tinker_register_service(register: Callable[[ServicePlugin], None]) -> None:
    """Register services: parts of the server that begin and end with it, with routes and a database of their own."""


@hookspec
def tinker_register_command(register: Callable[[CommandPlugin], None]) -> None:
    """Register commands of ``tinker-server``."""


@hookspec
def tinker_register_routes(register: Callable[[Any], None]) -> None:
    """Register Starlette routes that the server mounts beside its own; each must lie outside ``/api/v1``."""


@hookspec
def tinker_request_finished(
    request_id: str, request_type: RequestType, model_id: str | None, seconds: float, error: RequestError | None
) -> None:
    """Observe a finished request: seconds from acceptance to result, and its error if it failed."""
