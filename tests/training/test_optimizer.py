from __future__ import annotations

import math

import pytest
import torch

from tinker_core.errors import InvalidRequestError
from tinker_core.training.optimizer import ADAMW
from tinker_core.types import AdamParams, PreparedOptimStep


def step(**params: float) -> PreparedOptimStep:
    return PreparedOptimStep(request_id="r", model_id="m", adam_params=AdamParams(**params))


@pytest.mark.parametrize("field", ["learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_parameters_outside_their_range_are_named_and_change_nothing(field: str, value: float) -> None:
    optimizer = ADAMW.build({})
    weights = torch.ones(3)
    with pytest.raises(InvalidRequestError, match=field):
        optimizer.step(weights, torch.ones(3), step(**{field: value}))
    assert weights.tolist() == [1.0, 1.0, 1.0]
    assert optimizer.num_steps == 0
    assert optimizer.state() == {}


def test_settings_at_creation_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match="beta1"):
        ADAMW.build({"beta1": 0.5})


def test_a_loaded_state_continues_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 1000, generator=generator)
    whole, resumed = torch.ones(1000), torch.ones(1000)
    first, second = ADAMW.build({}), ADAMW.build({})
    for gradient in gradients[:2]:
        first.step(whole, gradient, step(weight_decay=0.1))
    resumed.copy_(whole)
    second.load({name: row.clone() for name, row in first.state().items()}, first.num_steps)
    for gradient in gradients[2:]:
        first.step(whole, gradient, step(grad_clip_norm=0.5))
        second.step(resumed, gradient, step(grad_clip_norm=0.5))
    assert torch.equal(whole, resumed)
