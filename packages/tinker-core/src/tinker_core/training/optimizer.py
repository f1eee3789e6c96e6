"""AdamW over flat float32 rows; every parameter is taken from the step itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from tinker_core.errors import CheckpointMismatchError, InvalidRequestError
from tinker_core.interfaces import FlatOptimizer, OptimizerPlugin
from tinker_core.optimizer_families import ADAMW_FAMILY, check_step_family
from tinker_core.types import AdamParams, PreparedOptimStep, SettingValue

_ROWS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Decoupled weight decay, bias correction and global-norm clipping exactly as in torch."""

    def __init__(self, norm: Callable[[torch.Tensor], float] | None = None) -> None:
        """``norm`` gives the norm of the whole gradient where a rank holds a part of it."""
        self._norm = norm or _norm
        self._rows: dict[str, torch.Tensor] = {}
        self._num_steps = 0

    def step(self, weights: torch.Tensor, gradient: torch.Tensor, step: PreparedOptimStep) -> dict[str, float]:
        """Update ``weights`` in place; reports ``grad_norm``, the gradient's norm before clipping."""
        params = _checked(step)
        norm = self._norm(gradient)
        # The formula of torch.nn.utils.clip_grad_norm_.
        factor = params.grad_clip_norm / (norm + 1e-6)
        if params.grad_clip_norm > 0 and factor < 1:
            gradient = gradient * factor
        if not self._rows:
            self._rows = {name: torch.zeros_like(weights) for name in _ROWS}
        self._update(weights, gradient, params)
        self._num_steps += 1
        return {"grad_norm": norm}

    def _update(self, weights: torch.Tensor, gradient: torch.Tensor, params: AdamParams) -> None:
        parameter = torch.nn.Parameter(weights, requires_grad=False)
        parameter.grad = gradient
        optimizer = torch.optim.AdamW(
            [parameter],
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
            fused=True,
        )
        count = torch.tensor(float(self._num_steps), dtype=torch.float32, device=weights.device)
        optimizer.state[parameter] = {"step": count, **self._rows}
        optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Both moments by name; empty before the first step."""
        return dict(self._rows)

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return self._num_steps

    def load(self, rows: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Replace the state by saved rows; no rows, after no steps, means fresh moments."""
        expected = set(_ROWS) if num_steps else set()
        if num_steps < 0 or set(rows) != expected:
            raise CheckpointMismatchError(
                f"AdamW after {num_steps} steps has rows {sorted(expected)}, the checkpoint has {sorted(rows)}"
            )
        self._rows = dict(rows)
        self._num_steps = num_steps


def _checked(step: PreparedOptimStep) -> AdamParams:
    check_step_family(ADAMW_FAMILY, step.adam_params, step.optimizer_params)
    params = step.adam_params
    assert params is not None
    limits = {
        "learning_rate": (params.learning_rate, 0.0, math.inf),
        "beta1": (params.beta1, 0.0, 1.0),
        "beta2": (params.beta2, 0.0, 1.0),
        "eps": (params.eps, 0.0, math.inf),
        "weight_decay": (params.weight_decay, 0.0, math.inf),
        "grad_clip_norm": (params.grad_clip_norm, 0.0, math.inf),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value < high:
            bound = f"at least {low:g}" + (f" and below {high:g}" if math.isfinite(high) else " and finite")
            raise InvalidRequestError(f"adam_params.{name} must be {bound}, got {value}")
    return params


def _norm(gradient: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient))


def _build(settings: Mapping[str, SettingValue], norm: Callable[[torch.Tensor], float] | None = None) -> FlatOptimizer:
    if any(settings.values()):
        raise InvalidRequestError(
            f"optimizer_config of adamw takes no settings, got {', '.join(sorted(settings))}; send them with each step"
        )
    return AdamW(norm)


ADAMW = OptimizerPlugin(name=ADAMW_FAMILY, build=_build, build_sharded=_build)
"""The optimizer family ``adamw``."""
