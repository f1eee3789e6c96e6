"""Which optimizer family a model has, and what its steps must carry. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tinker_core.errors import InvalidRequestError, UnsupportedFeatureError
from tinker_core.types import AdamParams, JsonObject

ADAMW_FAMILY = "adamw"
"""The family whose steps come as ``adam_params``; all others come as ``optimizer_params`` with their ``type``."""


def require_family(family: str, installed: Sequence[str]) -> None:
    """Raise `UnsupportedFeatureError` for a family that no plugin registers."""
    if family not in installed:
        known = ", ".join(sorted(installed)) or "none"
        raise UnsupportedFeatureError(
            f"optimizer {family!r} is not installed; installed optimizers: {known}. "
            "Choose one of them, or install a plugin that registers it"
        )


def check_step_family(family: str, adam_params: AdamParams | None, optimizer_params: JsonObject | None) -> None:
    """Raise `InvalidRequestError` for the parameters of another family than the model's."""
    if (adam_params is None) == (optimizer_params is None):
        raise InvalidRequestError("send exactly one of adam_params and optimizer_params")
    if family == ADAMW_FAMILY and adam_params is None:
        raise InvalidRequestError("this model's optimizer is 'adamw': send adam_params, not optimizer_params")
    if family != ADAMW_FAMILY:
        if optimizer_params is None:
            raise InvalidRequestError(
                f"this model's optimizer is {family!r}: send optimizer_params of type {family!r}, not adam_params"
            )
        if optimizer_params.get("type") != family:
            raise InvalidRequestError(
                f"this model's optimizer is {family!r}: optimizer_params.type must be {family!r}, "
                f"got {optimizer_params.get('type')!r}"
            )


def read_numbers(values: Mapping[str, object], defaults: Mapping[str, float | None], where: str) -> dict[str, float]:
    """Finite numbers by name, for optimizer plugins: a default of None means that the number is required.

    ``values`` are a step's optimizer_params, or an optimizer_config's settings.  Unknown keys are ignored while they
    are null, false, 0 or empty, and refused by name otherwise; raises `InvalidRequestError`.
    """
    unknown = sorted(key for key, value in values.items() if value and key != "type" and key not in defaults)
    if unknown:
        known = ", ".join(defaults) or "none"
        raise InvalidRequestError(f"{where} has unknown fields {', '.join(map(repr, unknown))}; known are {known}")
    found: dict[str, float] = {}
    for name, default in defaults.items():
        value = values.get(name)
        value = default if value is None else value
        if value is None:
            raise InvalidRequestError(f"{where}.{name} is required; send a number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidRequestError(f"{where}.{name} must be a finite number, got {str(value)[:80]}")
        found[name] = float(value)
    return found
