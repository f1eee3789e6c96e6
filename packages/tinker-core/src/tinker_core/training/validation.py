"""What must hold of a request before it may join a pass, so that a bad one never costs its neighbours anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinker_core.errors import (
    InvalidDatumError,
    InvalidLossConfigError,
    InvalidRequestError,
    UnknownLossError,
    UnsupportedFeatureError,
)
from tinker_core.interfaces import LossPlugin
from tinker_core.training.cells import TARGETS
from tinker_core.training.custom_validation import check_custom_inputs, check_dense_size
from tinker_core.training.provenance import SAMPLED, check_tiling, sampled_mask
from tinker_core.types import CUSTOM_LOSS, CustomLoss, Datum, PreparedModelPass, TensorData, TensorDType

IGNORED_INPUTS = frozenset({"mask"})
"""Loss inputs that clients add for their own use."""

_NOT_OFFERED = {
    CUSTOM_LOSS: "this trainer runs no custom losses; give a plain function to forward_backward_custom",
}
# A threshold may be infinite to mean "not clipped".
_MAY_BE_INFINITE = frozenset({"clip_low_threshold", "clip_high_threshold"})


@attrs.frozen(kw_only=True)
class PassLimits:
    """What a base model can take."""

    vocab_size: int
    max_context_length: int


def check_pass(request: PreparedModelPass, losses: Mapping[str, LossPlugin], limits: PassLimits) -> LossPlugin:
    """Check one request and return its loss; raises the `UserError` that names what to change."""
    loss = find_loss(request.loss_fn, losses)
    if not request.data:
        raise InvalidRequestError("data is empty; send at least one datum")
    _check_config(request, loss)
    custom_loss = request.custom_loss if loss.name == CUSTOM_LOSS else None
    for index, datum in enumerate(request.data):
        _check_datum(index, datum, loss, limits, custom_loss)
    if custom_loss is not None:
        check_dense_size(request.data, custom_loss)
    return loss


def find_loss(name: str, losses: Mapping[str, LossPlugin]) -> LossPlugin:
    """A loss by name; raises `UnknownLossError`, or `UnsupportedFeatureError` for one that is known but not offered."""
    loss = losses.get(name)
    if loss is not None:
        return loss
    if name in _NOT_OFFERED:
        raise UnsupportedFeatureError(f"loss_fn {name!r} is not offered: {_NOT_OFFERED[name]}")
    raise UnknownLossError(name, tuple(sorted(losses)))


def effective_config(config: Mapping[str, float | str], loss: LossPlugin) -> dict[str, float | str]:
    """A request's loss_fn_config with the loss's defaults filled in."""
    return {**loss.default_config, **config}


def loss_inputs(datum: Datum, loss: LossPlugin) -> dict[str, TensorData]:
    """The inputs of a checked datum that its loss may look at."""
    inputs = _own_inputs(datum)
    if loss.uses_provenance and datum.loss_fn_input_spans:
        inputs[SAMPLED] = sampled_mask(datum.loss_fn_input_spans)
    return inputs


def _own_inputs(datum: Datum) -> dict[str, TensorData]:
    return {name: tensor for name, tensor in datum.loss_fn_inputs.items() if name not in IGNORED_INPUTS}


def _check_config(request: PreparedModelPass, loss: LossPlugin) -> None:
    known = (*loss.required_config, *loss.default_config)
    for key, value in request.loss_fn_config.items():
        if key not in known:
            if not value:
                continue  # null, false, 0 and empty say nothing
            names = ", ".join(known) or "none"
            raise InvalidLossConfigError(f"loss_fn_config has no key {key!r} for {loss.name}; known keys: {names}")
        wants_text = isinstance(loss.default_config.get(key), str)
        if wants_text != isinstance(value, str) or isinstance(value, bool):
            kind = "text" if wants_text else "a number"
            raise InvalidLossConfigError(f"loss_fn_config[{key!r}] must be {kind}, got {value!r}")
        if not isinstance(value, str) and math.isnan(value):
            raise InvalidLossConfigError(f"loss_fn_config[{key!r}] must be a number, got nan")
    for key in loss.required_config:
        per_token = key in loss.optional_inputs and all(key in datum.loss_fn_inputs for datum in request.data)
        if key not in request.loss_fn_config and not per_token:
            raise InvalidLossConfigError(f"loss_fn_config needs {key!r} for {loss.name}; it has no default")
    if loss.check_config is not None:
        loss.check_config(effective_config(request.loss_fn_config, loss))


def _check_datum(
    index: int, datum: Datum, loss: LossPlugin, limits: PassLimits, custom_loss: CustomLoss | None
) -> None:
    tokens = datum.model_input.text_tokens()
    if tokens.size == 0:
        raise InvalidDatumError(index, "model_input has no tokens; at least one is needed")
    if tokens.size > limits.max_context_length:
        raise InvalidDatumError(
            index, f"model_input has {tokens.size} tokens; the context holds {limits.max_context_length}"
        )
    _check_ids(index, "model_input", tokens, limits.vocab_size)
    if custom_loss is None:
        _check_names(index, datum, loss)
    else:
        check_custom_inputs(index, datum, custom_loss)
    target = datum.loss_fn_inputs[TARGETS]
    if target.dtype is not TensorDType.INT64:
        raise InvalidDatumError(index, f"{TARGETS} must be int64 token ids, got {target.dtype}")
    _check_target_shape(index, target, int(tokens.size), loss)
    _check_ids(index, TARGETS, target.data, limits.vocab_size)
    if custom_loss is None:
        _check_values(index, datum, loss)


def _check_names(index: int, datum: Datum, loss: LossPlugin) -> None:
    inputs = _own_inputs(datum)
    for name in loss.required_inputs:
        if name not in inputs:
            raise InvalidDatumError(index, f"loss_fn_inputs lacks {name!r}, which {loss.name} needs")
    allowed = (*loss.required_inputs, *loss.optional_inputs)
    for name in inputs:
        if name not in allowed:
            raise InvalidDatumError(
                index, f"loss_fn_inputs has {name!r}, which {loss.name} does not take; it takes {', '.join(allowed)}"
            )


def _check_values(index: int, datum: Datum, loss: LossPlugin) -> None:
    target = datum.loss_fn_inputs[TARGETS]
    for name, tensor in _own_inputs(datum).items():
        if name != TARGETS:
            _check_input(index, name, tensor, target)
    if loss.uses_provenance and datum.loss_fn_input_spans:
        try:
            check_tiling(datum.loss_fn_input_spans, target.shape[0])
        except ValueError as error:
            raise InvalidDatumError(index, str(error)) from error


def _check_ids(index: int, name: str, ids: npt.NDArray[Any], vocab_size: int) -> None:
    if ids.size == 0:
        return
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if bad.size:
        raise InvalidDatumError(
            index, f"{name} holds {ids[bad[0]]} at element {bad[0]}; token ids are 0 to {vocab_size - 1}"
        )


def _check_target_shape(index: int, target: TensorData, length: int, loss: LossPlugin) -> None:
    if len(target.shape) not in (1, 2) or (len(target.shape) == 2 and not loss.soft_targets):
        shapes = "[T] or [T, K]" if loss.soft_targets else "[T]"
        raise InvalidDatumError(index, f"{TARGETS} must have shape {shapes} for {loss.name}, got {list(target.shape)}")
    if target.shape[0] != length:
        raise InvalidDatumError(index, f"{TARGETS} has length {target.shape[0]}, model_input has {length} tokens")
    if target.is_sparse:
        _check_distinct(index, TARGETS, target)


def _check_input(index: int, name: str, tensor: TensorData, target: TensorData) -> None:
    if tensor.shape != target.shape:
        raise InvalidDatumError(
            index, f"{name} has shape {list(tensor.shape)}, {TARGETS} has {list(target.shape)}; they must be equal"
        )
    if tensor.is_sparse:
        _check_distinct(index, name, tensor)
    values = tensor.data.astype(np.float64)
    bad = np.flatnonzero(np.isnan(values) if name in _MAY_BE_INFINITE else ~np.isfinite(values))
    if bad.size:
        raise InvalidDatumError(index, f"{name} holds {values[bad[0]]} at element {bad[0]}; it must be finite")


def _check_distinct(index: int, name: str, tensor: TensorData) -> None:
    assert tensor.col_indices is not None
    keys = tensor.row_indices() * tensor.shape[1] + tensor.col_indices
    if np.unique(keys).size != keys.size:
        raise InvalidDatumError(index, f"{name} stores one cell twice; sparse cells must be distinct")
