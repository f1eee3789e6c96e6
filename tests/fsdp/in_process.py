"""A trainer in the test's own process, and short ways to call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tinker_backend_fsdp.trainer import FsdpTrainer
from tinker_core.interfaces import RankContext, TrainerParts
from tinker_core.training.losses import BUILT_IN_LOSSES
from tinker_core.training.optimizer import ADAMW
from tinker_core.types import (
    AdamParams,
    BaseModelSpec,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    ModelInput,
    ModelPassResult,
    OptimizerConfig,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedOptimStep,
    SnapshotParts,
    TensorData,
)

PARTS = TrainerParts(losses={loss.name: loss for loss in BUILT_IN_LOSSES}, optimizers={ADAMW.name: ADAMW})


def build_trainer(path: Path, parts: TrainerParts = PARTS, **settings: Any) -> FsdpTrainer:
    context = RankContext(
        base_model=BaseModelSpec(name="tiny", path=str(path)),
        **{"rank": 0, "world_size": 1, "rendezvous": "", "device": "cpu", "dtype": "float32", **settings},
    )
    return FsdpTrainer(context, parts)


def create(trainer: FsdpTrainer, model_id: str, *, rank: int = 4, seed: int = 1, **config: Any) -> None:
    lora = LoraConfig(rank=rank, seed=seed, **config)
    trainer.create(PreparedModel(model_id=model_id, lora_config=lora, optimizer_config=OptimizerConfig()))


def datum(tokens: Sequence[int], targets: Any, **inputs: Any) -> Datum:
    arrays = {"target_tokens": targets, **inputs}
    tensors = {
        name: value if isinstance(value, TensorData) else TensorData.from_numpy(np.asarray(value))
        for name, value in arrays.items()
    }
    return Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs=tensors)


def request(
    model_id: str,
    data: Sequence[Datum],
    loss_fn: str = "cross_entropy",
    config: Mapping[str, float | str] | None = None,
    *,
    forward_only: bool = False,
) -> PreparedModelPass:
    return PreparedModelPass(
        request_id=f"request-of-{model_id}",
        model_id=model_id,
        data=tuple(data),
        loss_fn=loss_fn,
        loss_fn_config=dict(config or {}),
        forward_only=forward_only,
    )


def run_pass(trainer: FsdpTrainer, *requests: PreparedModelPass) -> tuple[ModelPassResult, ...]:
    steps = trainer.forward_backward(PreparedModelPassBatch(requests=requests))
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def run_one(trainer: FsdpTrainer, one: PreparedModelPass) -> ForwardBackwardOutput:
    (result,) = run_pass(trainer, one)
    assert result.error is None, result.error
    assert result.output is not None
    return result.output


def step(trainer: FsdpTrainer, model_id: str, **params: float) -> dict[str, float]:
    (result,) = trainer.optim_step(
        [PreparedOptimStep(request_id="step", model_id=model_id, adam_params=AdamParams(**params))]
    )
    assert result.error is None, result.error
    assert result.output is not None
    return result.output.metrics


def gradient(trainer: FsdpTrainer, model_id: str, directory: Path) -> dict[str, np.ndarray]:
    """The accumulated gradient by ``<module>.lora_A.weight`` or ``.lora_B.weight``."""
    directory.mkdir(parents=True, exist_ok=True)
    trainer.capture(model_id, SnapshotParts(optimizer=False, gradient=True))(str(directory))
    return load_file(directory / "gradient.safetensors")


def weights(trainer: FsdpTrainer, model_id: str, directory: Path) -> dict[str, np.ndarray]:
    directory.mkdir(parents=True, exist_ok=True)
    trainer.capture_weights(model_id)(str(directory))
    return load_file(directory / "adapter_model.safetensors")


def logprobs_of(output: ForwardBackwardOutput) -> list[np.ndarray]:
    return [np.asarray(record["logprobs"].to_numpy()) for record in output.loss_fn_outputs]


def random_data(
    seed: int, lengths: Sequence[int] = (5, 17, 1, 9), vocab_size: int = 112, *, policy: bool = False, **extra: Any
) -> list[Datum]:
    """Random tokens with random weights, or with sampler logprobs and advantages."""
    random = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens = random.integers(0, vocab_size, length)
        targets = random.integers(0, vocab_size, length)
        if policy:
            inputs = {
                "logprobs": (-4.5 + 0.7 * random.normal(size=length)).astype(np.float32),
                "advantages": random.normal(size=length).astype(np.float32),
            }
        else:
            inputs = {"weights": random.normal(size=length).astype(np.float32)}
        data.append(datum(tokens, targets, **inputs, **extra))
    return data


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """max |difference| / max |reference|."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
