"""Our own objective beside its formula, written down a second time in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tinker_core.errors import InvalidDatumError, InvalidLossConfigError, InvalidRequestError
from tinker_core.training.cells import target_cells
from tinker_core.training.logprobs import CellContext, evaluate_loss
from tinker_core.training.losses import STABLE_REINFORCE
from tinker_core.training.validation import PassLimits, check_pass, effective_config, loss_inputs
from tinker_core.types import Datum, ModelInput, PreparedModelPass, ProvenanceSpan, TensorData

LENGTH, PROMPT = 12, 4
LIMITS = PassLimits(vocab_size=50, max_context_length=64)
SPANS = (("prompt_tokens", PROMPT), ("sampled_tokens", LENGTH - PROMPT))
RANDOM = np.random.default_rng(0)
TARGETS = RANDOM.integers(0, 50, LENGTH)
LOGPROBS = (-2 + RANDOM.normal(size=LENGTH)).astype(np.float32)
OLD = np.where(np.arange(LENGTH) < PROMPT, 0.0, LOGPROBS + 0.8 * RANDOM.normal(size=LENGTH)).astype(np.float32)
ADVANTAGES = np.where(np.arange(LENGTH) < PROMPT, 0.0, RANDOM.normal(size=LENGTH)).astype(np.float32)


def make_datum(spans: tuple[tuple[str, int], ...] = SPANS, **extra: Any) -> Datum:
    arrays = {"target_tokens": TARGETS, "logprobs": OLD, "advantages": ADVANTAGES, **extra}
    return Datum(
        model_input=ModelInput.from_ints(TARGETS),
        loss_fn_inputs={name: TensorData.from_numpy(np.asarray(array)) for name, array in arrays.items()},
        loss_fn_input_spans=tuple(
            ProvenanceSpan(kind=kind, sequence_id="a", offset=0, length=length) for kind, length in spans
        ),
    )


def evaluate(datum: Datum, config: dict[str, float | str]) -> tuple[float, np.ndarray]:
    """Value and slopes through the same doors as in a pass."""
    request = PreparedModelPass(
        request_id="r", model_id="m", data=(datum,), loss_fn=STABLE_REINFORCE.name, loss_fn_config=config
    )
    loss = check_pass(request, {STABLE_REINFORCE.name: STABLE_REINFORCE}, LIMITS)
    cells = target_cells(loss_inputs(datum, loss))
    inputs = {name: torch.from_numpy(np.array(values)) for name, values in cells.inputs.items()}
    context = CellContext(effective_config(config, loss), inputs)
    value, slope = evaluate_loss(loss, torch.from_numpy(LOGPROBS.copy()), context, needs_gradient=True)
    assert slope is not None
    return value.item(), slope.numpy()


def formula(cap: float | np.ndarray, kl_coeff: float) -> tuple[float, np.ndarray]:
    p, q, a = LOGPROBS.astype(np.float64), OLD.astype(np.float64), ADVANTAGES.astype(np.float64)
    sampled = np.arange(LENGTH) >= PROMPT
    weight = np.minimum(np.exp(p - q), cap)
    value = -(weight * (p * a - 0.5 * kl_coeff * sampled * (p - q) ** 2)).sum()
    return value, -weight * (a - kl_coeff * sampled * (p - q))


@pytest.mark.parametrize("kl_coeff", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("cap", [None, 1.0, 0.5, 1e9])
def test_value_and_slopes_are_those_of_the_formula(cap: float | None, kl_coeff: float) -> None:
    config: dict[str, float | str] = {"kl_coeff": kl_coeff}
    if cap is not None:
        config["clip_high_threshold"] = cap
    value, slopes = evaluate(make_datum(), config)
    expected_value, expected_slopes = formula(2.0 if cap is None else cap, kl_coeff)
    assert value == pytest.approx(expected_value, rel=1e-5)
    np.testing.assert_allclose(slopes, expected_slopes, rtol=1e-5, atol=1e-6)


def test_thresholds_may_differ_by_token() -> None:
    caps = np.linspace(0.2, 3.0, LENGTH).astype(np.float32)
    value, slopes = evaluate(make_datum(clip_high_threshold=caps), {"kl_coeff": 0.1})
    expected_value, expected_slopes = formula(caps, 0.1)
    assert value == pytest.approx(expected_value, rel=1e-5)
    np.testing.assert_allclose(slopes, expected_slopes, rtol=1e-5, atol=1e-6)


def test_a_ratio_that_overflows_is_truncated() -> None:
    value, slopes = evaluate(make_datum(logprobs=np.full(LENGTH, -1e4, np.float32)), {})
    assert np.isfinite(value)
    np.testing.assert_allclose(slopes, -2.0 * ADVANTAGES, rtol=1e-6)


def test_the_defaults_need_no_provenance_and_the_kl_term_does() -> None:
    (value, slopes), (expected_value, expected_slopes) = (evaluate(make_datum(spans), {}) for spans in ((), SPANS))
    assert value == expected_value
    np.testing.assert_array_equal(slopes, expected_slopes)
    with pytest.raises(InvalidRequestError, match="with_provenance"):
        evaluate(make_datum(()), {"kl_coeff": 0.1})


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ((("prompt_tokens", 4), ("sampled_tokens", 7)), "cover 11 targets of 12"),
        ((("sampled_tokens", 10**15),), "cover 1000000000000000 targets of 12"),
        ((("sampled_tokens", -1), ("prompt_tokens", 13)), "length -1"),
        ((("dreamt_tokens", 12),), "dreamt_tokens"),
    ],
)
def test_provenance_must_tile_the_targets(spans: tuple[tuple[str, int], ...], reason: str) -> None:
    with pytest.raises(InvalidDatumError, match=reason):
        evaluate(make_datum(spans), {})


@pytest.mark.parametrize("config", [{"kl_coeff": -0.1}, {"clip_high_threshold": -1.0}])
def test_settings_below_zero_are_refused_by_name(config: dict[str, float | str]) -> None:
    with pytest.raises(InvalidLossConfigError, match=next(iter(config))):
        evaluate(make_datum(), config)
