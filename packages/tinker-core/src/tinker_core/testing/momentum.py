"""A plugin with an optimizer family of its own, ``sgd``, for tests of families other than AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tinker_core.errors import CheckpointMismatchError
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import FlatOptimizer, OptimizerPlugin
from tinker_core.optimizer_families import check_step_family, read_numbers

if TYPE_CHECKING:
    import torch

    from tinker_core.types import PreparedOptimStep, SettingValue

MOMENTUM_PLUGIN = "tinker_core.testing.momentum"
"""The module name under which `Plugins.load` finds the family."""

FAMILY = "sgd"
"""Its ``type``. Setting ``momentum`` (default 0) is fixed at creation, ``learning_rate`` comes with each step."""


class Momentum:
    """``velocity = momentum * velocity + gradient; weights -= learning_rate * velocity``."""

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._velocity: torch.Tensor | None = None
        self._num_steps = 0

    def step(self, weights: torch.Tensor, gradient: torch.Tensor, step: PreparedOptimStep) -> dict[str, float]:
        """One step; reports the gradient's norm."""
        check_step_family(FAMILY, step.adam_params, step.optimizer_params)
        params = read_numbers(step.optimizer_params or {}, {"learning_rate": None}, "optimizer_params")
        previous = self._velocity
        self._velocity = gradient.clone() if previous is None else previous * self._momentum + gradient
        weights -= params["learning_rate"] * self._velocity
        self._num_steps += 1
        return {"grad_norm": float(gradient.norm())}

    def state(self) -> dict[str, torch.Tensor]:
        """The velocity, once there is one."""
        return {} if self._velocity is None else {"velocity": self._velocity}

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return self._num_steps

    def load(self, rows: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Replace the velocity."""
        if set(rows) != ({"velocity"} if num_steps else set()):
            raise CheckpointMismatchError(f"{FAMILY} after {num_steps} steps cannot have rows {sorted(rows)}")
        self._velocity = rows.get("velocity")
        self._num_steps = num_steps


def _build(settings: Mapping[str, SettingValue]) -> FlatOptimizer:
    return Momentum(read_numbers(settings, {"momentum": 0.0}, "optimizer_config")["momentum"])


@hookimpl
def tinker_register_optimizer(register: Callable[[OptimizerPlugin], None]) -> None:
    """Register the family `FAMILY`."""
    register(OptimizerPlugin(name=FAMILY, build=_build))
