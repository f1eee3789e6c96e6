"""What all operations share: the list of them, the objects they pass on, and the differences between releases."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import tinker
from tinker import types

Operation = Callable[["Client"], None]
OPERATIONS: dict[str, Operation] = {}
"""By the name in the table, in the order of execution."""

BASE_MODEL = os.environ["CONFORMANCE_BASE_MODEL"]
VOCABULARY = int(os.environ["CONFORMANCE_VOCABULARY"])
RANK = 4


class Client(SimpleNamespace):
    """What earlier operations made: ``service``, ``rest``, ``model``, ``session_id`` and so on."""


class AbsentError(Exception):
    """This release of the SDK has no such call."""


def operation(name: str) -> Callable[[Operation], Operation]:
    """Add a function to the list."""

    def add(function: Operation) -> Operation:
        assert name not in OPERATIONS
        OPERATIONS[name] = function
        return function

    return add


def done(value: Any) -> Any:
    """The value itself, whether the release returns a plain object or a future of it."""
    return value.result() if hasattr(value, "result") else value


def needs(owner: Any, method: str, *parameters: str) -> Any:
    """A public method that has these parameters; `AbsentError` if this release has not."""
    found = getattr(owner, method, None)
    if found is None:
        raise AbsentError(method)
    known = inspect.signature(found).parameters
    missing = [name for name in parameters if name not in known]
    if missing:
        raise AbsentError(f"{method}({missing[0]})")
    return found


def needs_class(name: str) -> Any:
    """A class of `tinker.types`."""
    if not hasattr(types, name):
        raise AbsentError(name)
    return getattr(types, name)


def needs_adam_field(name: str) -> None:
    """A field that this release's `AdamParams` has; it refuses unknown ones."""
    if name not in types.AdamParams.model_fields:
        raise AbsentError(f"AdamParams.{name}")


def needs_loss(name: str) -> str:
    """A loss that this release lists."""
    if name not in get_args(types.LossFnType):
        raise AbsentError(name)
    return name


def tokens(length: int, seed: int = 0) -> list[int]:
    """Ordinary tokens of the tiny model."""
    return [int(token) for token in np.random.default_rng(seed).integers(4, 100, size=length)]


SEQUENCE = tokens(12)


def prompt(sequence: Sequence[int] = SEQUENCE) -> types.ModelInput:
    """Tokens as a model input."""
    return types.ModelInput.from_ints(list(sequence))


def datum(sequence: Sequence[int] = SEQUENCE, **inputs: Any) -> types.Datum:
    """Predict each next token; ``inputs`` are added, or replace ``weights``."""
    if not inputs:
        inputs = {"weights": np.ones(len(sequence) - 1, np.float32)}
    targets = np.array(sequence[1:], np.int64)
    return types.Datum(model_input=prompt(sequence[:-1]), loss_fn_inputs={"target_tokens": targets, **inputs})


def logprobs_of(output: Any, index: int = 0) -> np.ndarray:
    """Log-probabilities of one datum."""
    return np.array(output.loss_fn_outputs[index]["logprobs"].tolist(), np.float64)


def model_logprobs(model: Any, sequence: Sequence[int] = SEQUENCE) -> np.ndarray:
    """Log-probabilities of a sequence, after its first token, by a trained model."""
    return logprobs_of(done(model.forward([datum(sequence)], "cross_entropy")))


def sampler_logprobs(sampler: Any, sequence: Sequence[int] = SEQUENCE) -> np.ndarray:
    """The same by a sampling client."""
    values = done(sampler.compute_logprobs(prompt(sequence)))
    assert len(values) == len(sequence)
    assert values[0] is None
    return np.array(values[1:], np.float64)


def close(actual: Any, expected: Any, tolerance: float = 2e-4) -> None:
    """Fail unless all numbers agree."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def differs(actual: np.ndarray, expected: np.ndarray) -> None:
    """Fail unless some number moved."""
    assert np.abs(actual - expected).max() > 1e-3, "nothing changed"


def step(model: Any, learning_rate: float = 0.02, **fields: Any) -> float:
    """One pass and one step on the usual datum; the loss before it."""
    passed = model.forward_backward([datum()], "cross_entropy")
    stepped = model.optim_step(types.AdamParams(learning_rate=learning_rate, **fields))
    loss = done(passed).metrics["loss:sum"]
    done(stepped)
    return float(loss)


def new_model(client: Client, **options: Any) -> Any:
    """A fresh model, the same for the same seed."""
    settings = {"base_model": BASE_MODEL, "rank": RANK, "seed": 7, **options}
    return done(client.service.create_lora_training_client(**settings))


def refused(call: Callable[[], Any], *words: str) -> None:
    """Fail unless a call raises an error of the SDK whose text has all these words."""
    try:
        call()
    except (tinker.TinkerError, ValueError) as error:
        text = str(error)
    else:
        raise AssertionError("no error was raised")
    missing = [word for word in words if word not in text]
    assert not missing, f"the error does not say {missing}: {text}"
