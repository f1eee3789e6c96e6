"""The reward recipes that come with this package. Each takes a stripped completion and gives a number."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping

import attrs

from tinker_core.rewards import Judged, Reward, RewardError, RewardRecipePlugin


def exact_match(judged: Judged) -> Reward:
    """1 when the completion is the expected output, else 0."""
    expected = judged.params.get("expected", judged.expected_output)
    if expected is None:
        raise RewardError("exact_match_v1 requires an expected output")
    return _verdict(judged.completion == str(expected).strip(), 1.0, 0.0)


def contains(judged: Judged) -> Reward:
    """Whether ``needle`` is in the completion; case counts."""
    needle = judged.params.get("needle")
    if not needle:
        raise RewardError("contains_v1 requires params.needle")
    return _verdict(str(needle) in judged.completion, *_values(judged))


def row_reward(judged: Judged) -> Reward:
    """The row's own reward, else ``default``."""
    row = judged.reward
    return Reward(value=_number(judged.params, "default", 0.0) if row is None else row)


def trajectory_imitation(judged: Judged) -> Reward:
    """The row's reward (or ``reward_if_true``) for the recorded action, ``reward_if_false`` for any other."""
    expected = judged.params.get("expected", judged.expected_output)
    if expected is None:
        raise RewardError("trajectory_imitation_v1 requires an expected output")
    hit, miss = _values(judged)
    reward = judged.reward
    return _verdict(judged.completion == str(expected).strip(), hit if reward is None else reward, miss)


def task_verifier(judged: Judged) -> Reward:
    """Whether the completion is the task's flag, known by its SHA-256."""
    verification = judged.verification or {}
    hashed = verification.get("hash", verification.get("flag_hash"))
    if verification.get("method", "flag") != "flag" or not isinstance(hashed, str):
        raise RewardError("task_verifier_v1 currently supports only flag-based task verification")
    found = hashlib.sha256(judged.completion.encode()).hexdigest()
    return _verdict(found == hashed.removeprefix("sha256:").lower(), *_values(judged))


_FINAL = re.compile(r"####\s*([-+]?[\d,]*\.?\d+)")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def gsm8k(judged: Judged) -> Reward:
    """Whether the last number, after ``####`` if there is one, equals the expected one."""
    expected = last_number(str(judged.params.get("expected", judged.expected_output or "")))
    if expected is None:
        raise RewardError("gsm8k_v1 requires an expected output with a number")
    found = last_number(judged.completion)
    hit, miss = _values(judged)
    if found is None:
        return Reward(value=miss, metrics={"reward/passed": 0.0, "reward/extraction_failed": 1.0})
    judgement = _verdict(math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6), hit, miss)
    return attrs.evolve(judgement, metrics={**judgement.metrics, "reward/extraction_failed": 0.0})


def last_number(text: str) -> float | None:
    """The number after the last ``####``, else the last number of a text."""
    found = _FINAL.findall(text) or _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _values(judged: Judged) -> tuple[float, float]:
    return _number(judged.params, "reward_if_true", 1.0), _number(judged.params, "reward_if_false", 0.0)


def _number(params: Mapping[str, object], name: str, default: float) -> float:
    value = params.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RewardError(f"params.{name} must be a number, got {value!r}")
    return float(value)


def _verdict(passed: bool, hit: float, miss: float) -> Reward:
    return Reward(value=hit if passed else miss, metrics={"reward/passed": float(passed)})


def _check_contains(params: Mapping[str, object]) -> None:
    if not params.get("needle"):
        raise RewardError("contains_v1 requires params.needle")


BUILT_IN = (
    RewardRecipePlugin(name="exact_match_v1", score=exact_match),
    RewardRecipePlugin(name="contains_v1", score=contains, check_params=_check_contains),
    RewardRecipePlugin(name="row_reward_v1", score=row_reward),
    RewardRecipePlugin(name="trajectory_imitation_v1", score=trajectory_imitation),
    RewardRecipePlugin(name="task_verifier_v1", score=task_verifier, needs_task=True),
    RewardRecipePlugin(name="gsm8k_v1", score=gsm8k),
)
"""The recipes of this package."""
