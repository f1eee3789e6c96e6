from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinker_core.errors import InvalidDatumError, InvalidLossConfigError, UnknownLossError, UnsupportedFeatureError
from tinker_core.training.losses import BUILT_IN_LOSSES
from tinker_core.training.validation import PassLimits, check_pass, effective_config
from tinker_core.types import Datum, ModelInput, PreparedModelPass, TensorData, TensorDType

LOSSES = {loss.name: loss for loss in BUILT_IN_LOSSES}
LIMITS = PassLimits(vocab_size=10, max_context_length=5)
POLICY = {"logprobs": [-1.0, -2.0], "advantages": [1.0, -1.0]}


def check(loss_fn: str, config: dict[str, Any] | None = None, **inputs: Any) -> None:
    tensors = {
        name: value if isinstance(value, TensorData) else TensorData.from_numpy(np.asarray(value))
        for name, value in {"target_tokens": [1, 2], **inputs}.items()
    }
    datum = Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs=tensors)
    request = PreparedModelPass(
        request_id="r", model_id="m", data=(datum,), loss_fn=loss_fn, loss_fn_config=config or {}
    )
    check_pass(request, LOSSES, LIMITS)


@pytest.mark.parametrize("key", ["clip_low_threshold", "clip_high_threshold"])
def test_a_missing_gspo_threshold_is_named(key: str) -> None:
    config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    del config[key]
    mask = {"sequence_ratio_mask": [1.0, 1.0]}
    with pytest.raises(InvalidLossConfigError, match=key):
        check("gspo", config, **POLICY, **mask)
    check("gspo", config, **POLICY, **mask, **{key: [0.5, 0.5]})


def test_a_missing_dro_beta_is_named() -> None:
    with pytest.raises(InvalidLossConfigError, match="beta"):
        check("dro", **POLICY)
    check("dro", {"beta": 0.05}, **POLICY)


@pytest.mark.parametrize("value", ["0.1", float("nan"), True])
def test_a_mistyped_setting_is_named(value: object) -> None:
    with pytest.raises(InvalidLossConfigError, match="beta"):
        check("dro", {"beta": value}, **POLICY)


def test_unknown_settings_and_inputs_are_named_but_a_mask_is_ignored() -> None:
    with pytest.raises(InvalidLossConfigError, match=r"betta.*known keys: beta"):
        check("dro", {"beta": 1.0, "betta": 1.0}, **POLICY)
    with pytest.raises(InvalidDatumError, match=r"data\[0\].*'weights'.*importance_sampling"):
        check("importance_sampling", **POLICY, weights=[1.0, 1.0])
    check("importance_sampling", **POLICY, mask=[1.0, 0.0])


def test_losses_that_are_unknown_or_not_offered_are_told_apart() -> None:
    known = "cispo, cross_entropy, dro, gspo, importance_sampling, ppo, stable_reinforce"
    with pytest.raises(UnknownLossError, match=known):
        check("crossentropy")
    with pytest.raises(UnsupportedFeatureError, match="custom"):
        check("custom")


def test_soft_targets_need_cross_entropy_and_equal_shapes() -> None:
    soft = np.array([[1, 2, 3], [4, 5, 6]])
    check("cross_entropy", target_tokens=soft, weights=np.ones((2, 3)))
    with pytest.raises(InvalidDatumError, match=r"weights has shape \[2, 2\]"):
        check("cross_entropy", target_tokens=soft, weights=np.ones((2, 2)))
    with pytest.raises(InvalidDatumError, match=r"must have shape \[T\]"):
        check("ppo", target_tokens=soft, logprobs=np.ones((2, 3)), advantages=np.ones((2, 3)))


def test_a_sparse_cell_may_be_stored_once_only() -> None:
    doubled = TensorData(
        dtype=TensorDType.INT64,
        shape=(2, 3),
        data=np.array([1, 2, 3]),
        crow_indices=np.array([0, 2, 3]),
        col_indices=np.array([1, 1, 0]),
    )
    with pytest.raises(InvalidDatumError, match="stores one cell twice"):
        check("cross_entropy", target_tokens=doubled)


def test_infinite_thresholds_mean_not_clipped_but_must_be_numbers() -> None:
    check("ppo", **POLICY, clip_high_threshold=[np.inf, 1.2])
    with pytest.raises(InvalidDatumError, match="clip_high_threshold"):
        check("ppo", **POLICY, clip_high_threshold=[np.nan, 1.2])


def test_documented_defaults_fill_in() -> None:
    assert effective_config({}, LOSSES["ppo"]) == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert effective_config({"clip_low_threshold": 0.5}, LOSSES["cispo"]) == {
        "clip_low_threshold": 0.5,
        "clip_high_threshold": 4.0,
    }
