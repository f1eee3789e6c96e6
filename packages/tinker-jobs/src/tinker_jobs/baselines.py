"""The parameter ``baseline``, which every recipe has and none sees: what a reward is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from tinker_core.rewards import RewardError

BASELINE, DEFAULT = "baseline", "group_mean"
"""The parameter, and what it is where a request leaves it out; every trainer knows that one."""
_Baseline = TypeVar("_Baseline", bound=StrEnum)


def take_baseline(
    params: Mapping[str, Any], known: type[_Baseline], where: str = ""
) -> tuple[_Baseline, dict[str, Any]]:
    """The baseline that a recipe's parameters ask for, and the recipe's own ones.

    Raises `RewardError` for one that is not ``known``, with ``where`` that is so.
    """
    own = {name: value for name, value in params.items() if name != BASELINE}
    value = params.get(BASELINE, DEFAULT)
    if value not in tuple(known):
        raise RewardError(f"params.{BASELINE} must be one of {', '.join(known)}{where}, got {value!r}")
    return known(value), own
