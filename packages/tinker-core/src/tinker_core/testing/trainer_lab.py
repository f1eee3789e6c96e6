"""Short ways to drive a trainer behind a `BlockingGroup`, for `TrainerContract` and for tests of one trainer."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tinker_core.executors.protocol import GroupCapabilities, ModelName, StateCall
from tinker_core.testing.group import BlockingGroup
from tinker_core.types import (
    MANIFEST_FILE,
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    ModelInput,
    ModelPassResult,
    OptimizerConfig,
    OptimStepResult,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedOptimStep,
    RequestError,
    SnapshotParts,
    TensorData,
    TrainerCapabilities,
)

Arrays = dict[str, npt.NDArray[Any]]


def make_datum(tokens: npt.ArrayLike, targets: npt.ArrayLike, **inputs: npt.ArrayLike) -> Datum:
    """A datum with ``target_tokens`` and other loss inputs; floats become float32, integers int64."""
    arrays = {"target_tokens": targets, **inputs}
    tensors = {name: TensorData.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    return Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs=tensors)


class TrainerLab:
    """Creates models, runs passes and steps, and forgets its models at the end."""

    def __init__(self, group: BlockingGroup, directory: Path) -> None:
        self.group = group
        self._directory = directory
        self._models: list[str] = []
        capabilities: GroupCapabilities = group.call("capabilities")
        self.capabilities: TrainerCapabilities = capabilities.trainer

    def create(self, *, rank: int = 4, seed: int = 1, **settings: Any) -> str:  # noqa: ANN401 - LoraConfig's own
        """A new model; returns its id."""
        model_id = f"model-{len(self._models)}"
        lora = LoraConfig(rank=rank, seed=seed, **settings)
        self.group.call(
            "create", PreparedModel(model_id=model_id, lora_config=lora, optimizer_config=OptimizerConfig())
        )
        self._models.append(model_id)
        return model_id

    def close(self) -> None:
        """Unload all models."""
        for model_id in self._models:
            self.unload(model_id)

    def unload(self, model_id: str) -> None:
        """Forget a model."""
        self.group.call("unload", ModelName(model_id=model_id))

    def new_directory(self) -> Path:
        """An empty directory."""
        return Path(tempfile.mkdtemp(dir=self._directory))

    def data(self, seed: int, lengths: Sequence[int] = (5, 17, 1, 9), *, policy: bool = False) -> tuple[Datum, ...]:
        """Random tokens with random weights, or with sampler logprobs and advantages."""
        random = np.random.default_rng(seed)
        vocab_size = self.capabilities.vocab_size
        data = []
        for length in lengths:
            tokens, targets = random.integers(0, vocab_size, (2, length))
            if policy:
                logprobs = -np.log(vocab_size) + 0.3 * random.normal(size=length)
                data.append(make_datum(tokens, targets, logprobs=logprobs, advantages=random.normal(size=length)))
            else:
                data.append(make_datum(tokens, targets, weights=random.normal(size=length)))
        return tuple(data)

    def request(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        **settings: Any,  # noqa: ANN401
    ) -> PreparedModelPass:
        """One model's share of a pass."""
        return PreparedModelPass(
            request_id=f"pass-of-{model_id}", model_id=model_id, data=tuple(data), loss_fn=loss_fn, **settings
        )

    def run(self, *requests: PreparedModelPass) -> tuple[ModelPassResult, ...]:
        """One pass; results in order, errors included."""
        results: tuple[ModelPassResult, ...] = self.group.call(
            "forward_backward", PreparedModelPassBatch(requests=requests)
        )
        assert [result.request_id for result in results] == [request.request_id for request in requests]
        return results

    def run_one(self, request: PreparedModelPass) -> ForwardBackwardOutput:
        """A pass of one request that must succeed."""
        (result,) = self.run(request)
        return output_of(result)

    def steps(self, *model_ids: str, **params: float) -> tuple[OptimStepResult, ...]:
        """An optimizer step of each model."""
        requests = tuple(
            PreparedOptimStep(request_id=f"step-of-{name}", model_id=name, adam_params=AdamParams(**params))
            for name in model_ids
        )
        results: tuple[OptimStepResult, ...] = self.group.call("optim_step", requests)
        return results

    def step(self, model_id: str, **params: float) -> dict[str, float]:
        """A step that must succeed; returns its metrics."""
        (result,) = self.steps(model_id, **params)
        assert result.error is None, result.error
        assert result.output is not None
        return result.output.metrics

    def train(self, model_id: str, *seeds: int, **params: float) -> None:
        """A pass over random data and a step, for each seed."""
        for seed in seeds:
            self.run_one(self.request(model_id, self.data(seed)))
            self.step(model_id, **{"learning_rate": 0.01, **params})

    def snapshot(self, model_id: str, *, optimizer: bool = True, gradient: bool = False) -> Path:
        """A training checkpoint in a new directory."""
        directory = self.new_directory()
        parts = SnapshotParts(optimizer=optimizer, gradient=gradient)
        self.group.call("snapshot", StateCall(model_id=model_id, directory=str(directory), parts=parts))
        return directory

    def begin_snapshot(self, model_id: str, *, gradient: bool = True) -> tuple[Path, Future[None]]:
        """A snapshot of everything that is written in the background; its directory, and when it is complete."""
        directory = self.new_directory()
        parts = SnapshotParts(optimizer=True, gradient=gradient)
        call = StateCall(model_id=model_id, directory=str(directory), parts=parts, background=True)
        return directory, self.group.start("snapshot", call)

    @contextmanager
    def held_writes(self, model_id: str) -> Iterator[None]:
        """Nothing is written in the background while the block runs: an export before it waits for its manifest."""
        directory = self.new_directory()
        pipe = directory / MANIFEST_FILE
        os.mkfifo(pipe)  # opening it to write waits for a reader
        call = StateCall(model_id=model_id, directory=str(directory), background=True)
        first = self.group.start("export", call)
        try:
            yield
        finally:
            reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
            try:
                first.result(timeout=120)
            finally:
                os.close(reader)

    def restore(self, model_id: str, directory: Path, *, optimizer: bool = True, gradient: bool = False) -> None:
        """Put a checkpoint into a model."""
        parts = SnapshotParts(optimizer=optimizer, gradient=gradient)
        self.group.call("restore", StateCall(model_id=model_id, directory=str(directory), parts=parts))

    def export(self, model_id: str) -> Path:
        """Weights for samplers in a new directory."""
        directory = self.new_directory()
        self.group.call("export", StateCall(model_id=model_id, directory=str(directory)))
        return directory


def read_safetensors(path: Path, prefix: str = "") -> Arrays:
    """Arrays of a file by name without ``prefix``; empty if there is no file."""
    from safetensors.numpy import load_file

    if not path.exists():
        return {}
    return {name.removeprefix(prefix): array for name, array in load_file(path).items()}


def optimizer_steps(directory: Path) -> int:
    """Steps of the model that a checkpoint holds, as its manifest says."""
    steps: int = json.loads((directory / MANIFEST_FILE).read_text())["optimizer_steps"]
    return steps


def output_of(result: ModelPassResult) -> ForwardBackwardOutput:
    """The output of a request that must have succeeded."""
    assert result.error is None, result.error
    assert result.output is not None
    return result.output


def error_of(result: ModelPassResult | OptimStepResult) -> RequestError:
    """The error of a request that must have failed."""
    assert result.output is None
    assert result.error is not None
    return result.error


def logprobs_of(output: ForwardBackwardOutput) -> list[npt.NDArray[Any]]:
    """Logprobs of each datum."""
    return [record["logprobs"].to_numpy() for record in output.loss_fn_outputs]


def assert_close(found: Arrays, expected: Arrays, tolerance: float) -> None:
    """Equal names, and differences within ``tolerance`` of the largest element of all expected arrays."""
    assert found.keys() == expected.keys()
    scale = max((float(np.abs(array).max()) for array in expected.values()), default=0.0) or 1.0
    for name, wanted in expected.items():
        assert float(np.abs(found[name] - wanted).max()) <= tolerance * scale, name


def assert_identical(found: Arrays, expected: Arrays) -> None:
    """Equal names and bits."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


def assert_same_output(found: ForwardBackwardOutput, expected: ForwardBackwardOutput, tolerance: float) -> None:
    """Equal metrics and logprobs within ``tolerance``."""
    assert found.metrics == pytest.approx(expected.metrics, rel=tolerance, abs=10 * tolerance)
    for left, right in zip(logprobs_of(found), logprobs_of(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=10 * tolerance)
