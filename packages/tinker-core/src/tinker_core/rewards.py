"""What plugins add to reinforcement-learning jobs: reward recipes, and environments that tasks are done in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import attrs


@attrs.frozen(kw_only=True)
class Judged:
    """What a reward recipe is given."""

    completion: str
    """The policy's text, without white space around it."""
    row: Mapping[str, object]
    """The dataset's row as it is."""
    expected_output: str | None = None
    """What the row expects, from whichever of its usual keys holds it."""
    reward: float | None = None
    """The row's own reward."""
    verification: Mapping[str, object] | None = None
    """How the task says that it is verified."""
    params: Mapping[str, object] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Reward:
    """What it gives."""

    value: float
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    """Averaged over a step's completions and reported by name, such as ``reward/passed``."""


class RewardError(Exception):
    """A recipe that cannot judge, with why: parameters, row or task lack something. It ends the job."""


def _accept(_: Mapping[str, object]) -> None:
    """Any parameters."""


@attrs.frozen(kw_only=True)
class RewardRecipePlugin:
    """A named server-side reward."""

    name: str
    score: Callable[[Judged], Reward]
    """Called in the job's process. Raises `RewardError`."""
    check_params: Callable[[Mapping[str, object]], None] = _accept
    """Called when a job is submitted; raises `RewardError` for parameters that no row can make up for."""
    needs_task: bool = False
    """Whether it judges by a task, so that jobs without one are refused."""


@attrs.frozen(kw_only=True)
class Observation:
    """What an environment answers to a message of the policy."""

    text: str
    finished: bool = False
    """Whether nothing more can be done."""


@attrs.frozen(kw_only=True)
class CommandResult:
    """How a command inside an environment ended."""

    exit_code: int
    output: str


class TaskEnvironment(Protocol):
    """One fresh place to do a task in. Used by one thread; its errors end the episode, not the job.

    Nothing can interrupt its methods: each must end within the seconds that the environment was opened for.
    """

    def act(self, message: str) -> Observation:
        """Let the policy's message take effect."""

    def run(self, command: Sequence[str], timeout: float) -> CommandResult:
        """Run a command inside, to verify what was done; raises `TimeoutError` after so many seconds."""

    def close(self) -> None:
        """Throw the place away; called once, whatever happened."""


@attrs.frozen(kw_only=True)
class EnvironmentPlugin:
    """A provider of environments, such as containers."""

    name: str
    open: Callable[[Mapping[str, object], Mapping[str, object], float], TaskEnvironment]
    """(the task's file as it is, ``env_inputs`` or ``inputs`` of the dataset's row, seconds that it may live) -> a new
    environment. Called in the job's process, in the thread that uses it."""
