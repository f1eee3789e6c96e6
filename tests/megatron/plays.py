"""What tests of numerics do with a trainer of any backend in any world, writing down what it answers.

``python -m tests.megatron.plays RANK PLAN`` is one rank of a world; ``PLAN`` is JSON:
``{"num_ranks", "options", "scenes": [{"name", "play", "path", "settings"}], "out", "rendezvous"}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from tests.fsdp import in_process as lib
from tests.megatron.groups import megatron_spec
from tinker_core.executors.build import build_rank, rank_context
from tinker_core.interfaces import Trainer
from tinker_core.testing.graph_builder import clipped_policy_loss
from tinker_core.testing.trainer_lab import Arrays
from tinker_core.types import (
    CUSTOM_LOSS,
    Datum,
    ModelPassResult,
    PreparedModelPass,
    ProvenanceSpan,
    SnapshotParts,
    TensorData,
)

TENANTS: dict[str, dict[str, Any]] = {
    "one": {"rank": 4, "seed": 1, "alpha": 12.0},
    "two": {"rank": 8, "seed": 2},
    "three": {"rank": 2, "seed": 3, "train_mlp": False},
    "untrained": {"rank": 16, "seed": 4},
}
"""LoRA settings of the models of `tenants`."""
STEPS: dict[int, dict[str, float]] = {
    1: {"learning_rate": 0.05, "beta1": 0.9, "beta2": 0.95, "eps": 0.01, "weight_decay": 0.1, "grad_clip_norm": 0.5},
    2: {"learning_rate": 0.02, "beta1": 0.8, "beta2": 0.9, "eps": 1.0, "weight_decay": 0.0, "grad_clip_norm": 0.0},
}
"""Optimizer parameters after each pass of `tenants`.

Each eps is of the size of the gradients: a small one would make of a gradient near zero, where sums are rounded, a step
of full length.
"""
LOSSES: dict[str, dict[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {},
    "cispo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.4},
    "dro": {"beta": 0.3},
    "gspo": {"clip_low_threshold": 0.6, "clip_high_threshold": 1.1},
    "stable_reinforce": {"kl_coeff": 0.2},
}
"""Configurations of the losses of `losses`; the custom loss comes on top."""


@attrs.frozen(kw_only=True)
class Scene:
    """A play on a model."""

    name: str
    play: str
    path: str
    settings: dict[str, Any] = attrs.field(factory=dict)
    """Fields of the worker group's spec."""


def tenant_requests(number: int, vocab_size: int) -> list[PreparedModelPass]:
    """The requests of the first and the second pass: several ranks, losses, and models that are only asked."""
    policy = lib.random_data(10 + number, (12, 3, 30), vocab_size, policy=True)
    return [
        lib.request("one", lib.random_data(number, vocab_size=vocab_size)),
        lib.request("untrained", lib.random_data(30 + number, (8, 2), vocab_size), forward_only=True),
        lib.request("two", policy, "ppo"),
        lib.request("three", lib.random_data(20 + number, (7, 21), vocab_size), forward_only=number == 2),
    ]


def all_logprobs_datum(vocab_size: int) -> Datum:
    """Asks for the log-probability of every token at every place."""
    tokens = np.random.default_rng(5).integers(0, vocab_size, 9)
    targets = np.tile(np.arange(vocab_size), (9, 1))
    return lib.datum(tokens, targets, weights=np.ones(targets.shape, np.float32))


def tenants(trainer: Trainer, out: Path) -> None:
    """Two packed passes of several models, each with a step; what they answer, gradients and weights."""
    vocab_size = trainer.capabilities().vocab_size
    for name, settings in TENANTS.items():
        lib.create(trainer, name, **settings)
        _export(trainer, name, out / "weights-0" / name)
    for number in (1, 2):
        requests = tenant_requests(number, vocab_size)
        found = _record(lib.run_pass(trainer, *requests))
        for request in requests:
            if not request.forward_only:
                _snapshot(trainer, request.model_id, out / f"gradient-{number}" / request.model_id)
                metrics = lib.step(trainer, request.model_id, **STEPS[number])
                found[f"{request.model_id}.norm"] = np.array(metrics["grad_norm"])
                _export(trainer, request.model_id, out / f"weights-{number}" / request.model_id)
        _write(out / f"pass-{number}.npz", found)
    datum = all_logprobs_datum(vocab_size)
    _write(out / "all.npz", _record(lib.run_pass(trainer, lib.request("one", [datum], forward_only=True))))


def losses(trainer: Trainer, out: Path) -> None:
    """Each loss on the same trained model: what it answers, and the gradient."""
    lib.create(trainer, "m", rank=4, seed=1, alpha=12.0)
    lib.run_one(trainer, lib.request("m", lib.random_data(0)))
    lib.step(trainer, "m", learning_rate=0.02)
    for request in loss_requests():
        found = _record(lib.run_pass(trainer, request))
        _write(out / f"{request.loss_fn}.npz", found)
        _snapshot(trainer, "m", out / "gradient" / request.loss_fn)
        lib.step(trainer, "m", learning_rate=0.0)


def loss_requests() -> list[PreparedModelPass]:
    """One request for each loss."""
    found = [
        lib.request("m", _loss_data(name), name, config) for name, config in LOSSES.items() if name != "cross_entropy"
    ]
    found.append(lib.request("m", lib.random_data(50), "cross_entropy"))
    data = [_as_custom(datum) for datum in lib.random_data(51, policy=True)]
    custom = lib.request("m", data, CUSTOM_LOSS, {"loss_id": "loss"})
    return [*found, attrs.evolve(custom, custom_loss=clipped_policy_loss())]


def _loss_data(name: str) -> list[Datum]:
    data = lib.random_data(52, (6, 25, 11), policy=True)
    for index, datum in enumerate(data):
        size = datum.model_input.text_tokens().size
        if name == "gspo":
            datum.loss_fn_inputs["sequence_ratio_mask"] = TensorData.from_numpy((np.arange(size) % 3 != 1) * 1.0)
        if name == "stable_reinforce":
            kinds = (("prompt_tokens", 2), ("sampled_tokens", size - 2))
            spans = [ProvenanceSpan(kind=kind, sequence_id="s", offset=0, length=length) for kind, length in kinds]
            data[index] = attrs.evolve(datum, loss_fn_input_spans=tuple(spans))
    return data


def _as_custom(datum: Datum) -> Datum:
    inputs = dict(datum.loss_fn_inputs)
    inputs["old"] = inputs.pop("logprobs")
    return attrs.evolve(datum, loss_fn_inputs=inputs)


PLAYS: dict[str, Callable[[Trainer, Path], None]] = {"tenants": tenants, "losses": losses}


def _record(results: Sequence[ModelPassResult]) -> Arrays:
    found = {}
    for result in results:
        assert result.output is not None, result.error
        name = result.request_id.removeprefix("request-of-")
        found[f"{name}.logprobs"] = np.concatenate([one.ravel() for one in lib.logprobs_of(result.output)])
        for metric, value in result.output.metrics.items():
            found[f"{name}.{metric}"] = np.array(value)
    return found


def _write(path: Path, found: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **found)


def _export(trainer: Trainer, model_id: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    trainer.capture_weights(model_id)(str(directory))


def _snapshot(trainer: Trainer, model_id: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    trainer.capture(model_id, SnapshotParts(optimizer=False, gradient=True))(str(directory))


def act(scene: Scene, num_ranks: int, options: dict[str, Any], rank: int, rendezvous: str, out: Path) -> None:
    """One scene in one rank; rank 0 writes into ``out``, the others into a directory beside it."""
    spec = megatron_spec(Path(scene.path), num_ranks, options, **scene.settings)
    trainer, _ = build_rank(spec, rank_context(spec, rank, rendezvous))
    try:
        PLAYS[scene.play](trainer, out / (scene.name if rank == 0 else f"rank-{rank}/{scene.name}"))
    finally:
        trainer.close()


def main() -> None:
    rank, plan = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for number, scene in enumerate(plan["scenes"]):
        rendezvous = f"file://{plan['rendezvous']}-{number}"
        act(Scene(**scene), plan["num_ranks"], plan["options"], rank, rendezvous, Path(plan["out"]))


if __name__ == "__main__":
    main()
