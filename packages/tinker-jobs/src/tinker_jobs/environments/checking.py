"""What a job with environments needs. Free of torch and the SDK: the server checks requests with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import attrs

from tinker_core.rewards import EnvironmentPlugin, RewardError
from tinker_jobs.environments.names import AGENT, VERIFIER
from tinker_jobs.parameters import read_number

FLAG, SCRIPT = "env_flag", "env_script"
_DEFAULT_TIMEOUT_S = {VERIFIER: 300.0, AGENT: 600.0}
_DEFAULT_MAX_TURNS = 20

_N = TypeVar("_N", int, float)


@attrs.frozen(kw_only=True)
class EnvironmentParams:
    """A recipe's parameters, with defaults for what was left out."""

    max_concurrent: int
    """Environments that are open at once."""
    timeout_s: float
    """How long one may live."""
    reward_if_true: float
    reward_if_false: float
    max_turns: int


@attrs.frozen(kw_only=True)
class Verification:
    """How an environment is verified once the policy has done what it would."""

    command: tuple[str, ...]
    timeout_s: float
    expected_exit_code: int = 0
    expected_text: str | None = None
    """What the command must write; None for anything."""
    expected_hash: str | None = None
    """SHA-256 of that, as hexadecimal digits."""


def read_params(recipe: str, params: Mapping[str, object], max_turns: int | None) -> EnvironmentParams:
    """The parameters of a recipe; ``max_turns`` is the request's own. Raises `RewardError`."""
    known = {"max_concurrent_rollouts", "env_timeout_sec", "reward_if_true", "reward_if_false"}
    known |= {"max_turns"} if recipe == AGENT else set()
    if unknown := sorted(set(params) - known):
        raise RewardError(f"{recipe}: unknown params {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return EnvironmentParams(
        max_concurrent=_count(params, "max_concurrent_rollouts", 8),
        timeout_s=_positive(params, "env_timeout_sec", _DEFAULT_TIMEOUT_S[recipe]),
        reward_if_true=read_number(params, "reward_if_true", 1.0),
        reward_if_false=read_number(params, "reward_if_false", 0.0),
        max_turns=1 if recipe == VERIFIER else _count(params, "max_turns", max_turns or _DEFAULT_MAX_TURNS),
    )


def read_verification(task: Mapping[str, object]) -> Verification:
    """How a task says that its environment is verified. Raises `RewardError`."""
    found = task.get("verification")
    method = found.get("method") if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or method not in (FLAG, SCRIPT):
        raise RewardError(f"the task's verification must have the method {FLAG} or {SCRIPT}, got {method!r}")
    if method == SCRIPT:
        return Verification(
            command=(_text(found, "script_path"),),
            timeout_s=_positive(found, "timeout_sec", 30.0),
            expected_exit_code=_integer(found, "expected_exit_code", 0),
        )
    hashed, expected = found.get("hash"), found.get("expected")
    if not isinstance(hashed, str) and not isinstance(expected, str):
        raise RewardError(f"{FLAG} verification needs hash (sha256:…) or expected")
    return Verification(
        command=("cat", _text(found, "flag_path", "/tmp/flag")),
        timeout_s=_positive(found, "timeout_sec", 10.0),
        expected_text=expected if not isinstance(hashed, str) and isinstance(expected, str) else None,
        expected_hash=hashed.removeprefix("sha256:").lower() if isinstance(hashed, str) else None,
    )


def choose_provider(task: Mapping[str, object], providers: Mapping[str, EnvironmentPlugin]) -> EnvironmentPlugin:
    """The provider that a task names as ``environment: {provider: NAME}``, or the only one. Raises `RewardError`."""
    if not providers:
        raise RewardError("this server has no provider of environments; install a plugin that registers one")
    names = ", ".join(sorted(providers))
    environment = task.get("environment")
    name = environment.get("provider") if isinstance(environment, Mapping) else None
    if name is None and len(providers) == 1:
        return next(iter(providers.values()))
    if name is None:
        raise RewardError(f"the task must name its provider as environment.provider, one of {names}")
    if name not in providers:
        raise RewardError(f"the task's environment.provider {name!r} is none of this server's: {names}")
    return providers[name]


def check_environment_job(
    recipe: str,
    params: Mapping[str, object],
    task: Mapping[str, object],
    providers: Mapping[str, EnvironmentPlugin],
) -> None:
    """Raise `RewardError` when no job with this recipe could run: wrong parameters, no provider, no verification.

    ``task`` is the task's file, ``params`` are the recipe's without ``baseline``, which all recipes have.
    """
    read_params(recipe, params, None)
    choose_provider(task, providers)
    read_verification(task)


def _text(found: Mapping[str, object], name: str, default: str = "") -> str:
    value = found.get(name, default)
    if not isinstance(value, str) or not value:
        raise RewardError(f"the task's verification needs {name}, got {value!r}")
    return value


def _integer(found: Mapping[str, object], name: str, default: int) -> int:
    value = found.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RewardError(f"{name} must be an integer, got {value!r}")
    return value


def _count(params: Mapping[str, object], name: str, default: int) -> int:
    return _above_zero(name, _integer(params, name, default))


def _positive(params: Mapping[str, object], name: str, default: float) -> float:
    return _above_zero(name, read_number(params, name, default))


def _above_zero(name: str, value: _N) -> _N:
    if value <= 0:
        raise RewardError(f"{name} must be greater than 0, got {value!r}")
    return value
