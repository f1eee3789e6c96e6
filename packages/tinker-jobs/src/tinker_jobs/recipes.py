"""The reward recipes that come with this package. Each takes a stripped completion and gives a number."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping

import attrs

from tinker_core.rewards import Judged, Reward, RewardError, RewardRecipePlugin
from tinker_jobs.parameters import read_number

Params = Mapping[str, object]

DEFAULT_RECIPE = "row_reward_v1"
"""The recipe of a job that answers prompts and names none."""

VALUES = ("reward_if_true", "reward_if_false")
"""What a passed and a failed completion are worth: 1 and 0, unless the parameters say otherwise."""


def exact_match(judged: Judged) -> Reward:
    """1 when the completion is the expected output, else 0."""
    return _verdict(judged.completion.strip() == _expected(judged, "exact_match_v1").strip(), 1.0, 0.0)


def contains(judged: Judged) -> Reward:
    """Whether ``needle`` is in the completion; case counts."""
    return _verdict(_needle(judged.params) in judged.completion, *_values(judged.params))


def row_reward(judged: Judged) -> Reward:
    """The row's own reward, else ``default``."""
    row = judged.reward
    return Reward(value=_number(judged.params, "default", 0.0) if row is None else row)


def trajectory_imitation(judged: Judged) -> Reward:
    """The row's reward (or ``reward_if_true``) for the recorded action, ``reward_if_false`` for any other."""
    hit, miss = _values(judged.params)
    passed = judged.completion.strip() == _expected(judged, "trajectory_imitation_v1").strip()
    return _verdict(passed, hit if judged.reward is None else judged.reward, miss)


def task_verifier(judged: Judged) -> Reward:
    """Whether the completion is the task's flag, known by its SHA-256."""
    if judged.verification is None:
        raise RewardError("task_verifier_v1 requires a task with verification")
    if judged.verification.get("method", "flag") != "flag":
        raise RewardError("task_verifier_v1 currently supports only flag-based task verification")
    hashed = judged.verification.get("hash") or judged.verification.get("flag_hash")
    if not isinstance(hashed, str) or not _HASH.fullmatch(hashed):
        raise RewardError("task_verifier_v1 requires verification.hash as sha256:<64 hexadecimal digits>")
    found = hashlib.sha256(judged.completion.strip().encode()).hexdigest()
    return _verdict(f"sha256:{found}" == hashed.lower(), *_values(judged.params))


def gsm8k(judged: Judged) -> Reward:
    """Whether the last number, after ``####`` if there is one, equals the expected one."""
    expected = last_number(_expected(judged, "gsm8k_v1"))
    if expected is None:
        raise RewardError("gsm8k_v1 requires an expected output with a number")
    found = last_number(judged.completion)
    passed = found is not None and math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)
    verdict = _verdict(passed, *_values(judged.params))
    return attrs.evolve(verdict, metrics={**verdict.metrics, "reward/extraction_failed": float(found is None)})


_HASH = re.compile(r"sha256:[0-9a-fA-F]{64}")
_UNSIGNED = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_FINAL = re.compile(rf"####\s*\$?([-+]?{_UNSIGNED})")
# A sign belongs to a number unless it stands between two: "7-5" ends with 5.
_BARE = re.compile(rf"((?:(?<![\w.)])[-+])?{_UNSIGNED})")


def last_number(text: str) -> float | None:
    """The number after the last ``####``, else the last number of a text; commas are left out."""
    found = _FINAL.findall(text) or _BARE.findall(text)
    return float(found[-1].replace(",", "")) if found else None


# --- parameters -------------------------------------------------------------------------------------------------------


def _expected(judged: Judged, recipe: str) -> str:
    expected = judged.params.get("expected", "")
    if expected == "":
        expected = judged.expected_output
    if expected is None or expected == "":
        raise RewardError(f"{recipe} requires an expected output")
    return str(expected)


def _needle(params: Params) -> str:
    needle = params.get("needle")
    if not isinstance(needle, str) or not needle:
        raise RewardError("contains_v1 requires params.needle")
    return needle


def _values(params: Params) -> tuple[float, float]:
    return _number(params, "reward_if_true", 1.0), _number(params, "reward_if_false", 0.0)


def _number(params: Params, name: str, default: float) -> float:
    return read_number(params, name, default, prefix="params.")


def _verdict(passed: bool, hit: float, miss: float) -> Reward:
    return Reward(value=hit if passed else miss, metrics={"reward/passed": float(passed)})


def _accepts(recipe: str, *names: str) -> Callable[[Params], None]:
    """A check of parameters: no others than these, of their types."""

    def check(params: Params) -> None:
        for name in params:
            if name not in names:
                known = ", ".join(f"params.{one}" for one in names)
                raise RewardError(f"{recipe} does not know params.{name}; it takes {known}")
        if "needle" in names:
            _needle(params)
        expected = params.get("expected", "")
        if isinstance(expected, bool) or not isinstance(expected, str | int | float):
            raise RewardError(f"params.expected must be text or a number, got {expected!r}")
        for name in (*VALUES, "default"):
            _number(params, name, 0.0)

    return check


def _recipe(name: str, score: Callable[[Judged], Reward], *params: str, needs_task: bool = False) -> RewardRecipePlugin:
    return RewardRecipePlugin(name=name, score=score, check_params=_accepts(name, *params), needs_task=needs_task)


BUILT_IN = (
    _recipe("exact_match_v1", exact_match, "expected"),
    _recipe("contains_v1", contains, "needle", *VALUES),
    _recipe(DEFAULT_RECIPE, row_reward, "default"),
    _recipe("trajectory_imitation_v1", trajectory_imitation, "expected", *VALUES),
    _recipe("task_verifier_v1", task_verifier, *VALUES, needs_task=True),
    _recipe("gsm8k_v1", gsm8k, "expected", *VALUES),
)
"""The recipes of this package."""
