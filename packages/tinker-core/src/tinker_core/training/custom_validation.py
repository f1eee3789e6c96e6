"""What must hold of the data of a custom loss: each has the inputs that the loss reads, of the declared rank.

Data travel as they are, so other inputs are no error, and values may be what they want: a result that is not finite is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinker_core.errors import InvalidDatumError, InvalidRequestError
from tinker_core.training.cells import TARGETS
from tinker_core.types import CustomLoss, Datum

MAX_FILLED_UP = 2**24
"""Elements of a request's sparse inputs once they are filled up, as a custom loss sees them."""


def check_custom_inputs(index: int, datum: Datum, loss: CustomLoss) -> None:
    """Raise `InvalidDatumError` for an input that is missing or of another rank."""
    for entry, key in [(loss.inputs[0], TARGETS), *((entry, entry.name) for entry in loss.inputs[1:])]:
        tensor = datum.loss_fn_inputs.get(key)
        if tensor is None:
            raise InvalidDatumError(index, f"loss_fn_inputs lacks {key!r}, which custom loss {loss.name!r} reads")
        # A scalar travels without a shape, and arrives as one element.
        scalar = entry.rank == 0 and tensor.data.size == 1 and len(tensor.shape) <= 1
        if len(tensor.shape) != entry.rank and not scalar:
            raise InvalidDatumError(
                index,
                f"{key} has shape {list(tensor.shape)}, but custom loss {loss.name!r} declares {entry.name} "
                f"of rank {entry.rank}",
            )
    if datum.loss_fn_inputs[TARGETS].data.size == 0:
        raise InvalidDatumError(index, f"{TARGETS} is empty; a custom loss needs at least one")


def check_dense_size(data: Sequence[Datum], loss: CustomLoss) -> None:
    """Raise `InvalidRequestError` for sparse inputs of few bytes that fill up to very many."""
    names = (TARGETS, *(entry.name for entry in loss.inputs[1:]))
    sparse = [datum.loss_fn_inputs[name] for datum in data for name in names if datum.loss_fn_inputs[name].is_sparse]
    total = sum(math.prod(tensor.shape) for tensor in sparse)
    if total > MAX_FILLED_UP:
        raise InvalidRequestError(
            f"the sparse loss_fn_inputs have {total} elements when filled up; custom loss {loss.name!r} takes at most "
            f"{MAX_FILLED_UP} in one request, so send fewer data per call or fewer columns"
        )
