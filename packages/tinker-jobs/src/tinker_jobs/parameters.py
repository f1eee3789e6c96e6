"""Parameters of recipes and reward policies."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tinker_core.rewards import RewardError


def read_number(params: Mapping[str, object], name: str, default: float, *, prefix: str = "") -> float:
    """A finite number; ``prefix`` stands before its name in errors. Raises `RewardError`."""
    value = params.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RewardError(f"{prefix}{name} must be a number, got {value!r}")
    return float(value)
