"""What tinker-jobs adds to a server: the service ``jobs``, the command ``jobs``, and reward recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tinker_core.extensions import CommandPlugin, Service, ServiceContext, ServicePlugin
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import Option

if TYPE_CHECKING:
    import argparse

    from tinker_core.rewards import RewardRecipePlugin

OPTIONS = (
    Option(name="jobs-max-running", type=int, default=2, help="training jobs that run at once; 0 only queues them"),
    Option(
        name="jobs-organization", type=str, default="local", help="organization that clients of training jobs must name"
    ),
    Option(name="jobs-workspace", type=str, default="default", help="its one workspace"),
    Option(
        name="jobs-ray-address",
        type=str,
        default="",
        help="Ray cluster for GRPO jobs, as host:port; empty starts a local one for each job",
    ),
    Option(
        name="jobs-ray-server-url",
        type=str,
        default="",
        help="URL at which the nodes of that cluster reach this server; empty where all are on its machine",
    ),
)


def _build(context: ServiceContext) -> Service:
    from tinker_jobs.service.service import JobService

    return JobService(context)


@hookimpl
def tinker_register_service(register: Callable[[ServicePlugin], None]) -> None:
    """Register ``jobs``: queues training jobs and runs them."""
    register(ServicePlugin(name="jobs", build=_build, options=OPTIONS))


def _run_command(arguments: Sequence[str]) -> int:
    from tinker_jobs.cli.command import run_jobs

    return run_jobs(arguments)


def _make_parser() -> argparse.ArgumentParser:
    from tinker_jobs.cli.command import make_jobs_parser

    return make_jobs_parser()


@hookimpl
def tinker_register_command(register: Callable[[CommandPlugin], None]) -> None:
    """Register ``tinker-server jobs``."""
    register(
        CommandPlugin(
            name="jobs", help="submit and watch training jobs, add datasets", run=_run_command, make_parser=_make_parser
        )
    )


@hookimpl
def tinker_register_reward_recipe(register: Callable[[RewardRecipePlugin], None]) -> None:
    """Register the built-in recipes."""
    from tinker_jobs.recipes import BUILT_IN

    for recipe in BUILT_IN:
        register(recipe)
