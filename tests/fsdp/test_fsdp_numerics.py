"""The trainer beside Hugging Face + PEFT, in float32: the same logprobs and the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from peft import PeftModel

from tests.fsdp import in_process as lib
from tests.models import write_tiny_model
from tests.peft_reference import formula, gradients_of, load_peft, reference_logprobs
from tinker_backend_fsdp.trainer import FsdpTrainer
from tinker_core.types import Datum, PreparedModelPass, SnapshotParts, TensorData, TensorDType

TOLERANCE = 1e-5
CONFIGS = {
    "ppo": {},
    "cispo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.4},
    "dro": {"beta": 0.3},
    "gspo": {"clip_low_threshold": 0.6, "clip_high_threshold": 1.1},
}


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen3", "qwen3-tied", "qwen2"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, _, tied = request.param.partition("-")
    return write_tiny_model(tmp_path_factory.mktemp(request.param), kind, tie=bool(tied))


@attrs.frozen
class Pair:
    trainer: FsdpTrainer
    reference: PeftModel


@pytest.fixture(scope="module")
def pair(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A trained adapter in the trainer, and the same one in PEFT, loaded from the trainer's export."""
    trainer = lib.build_trainer(model_path, micro_batch_tokens=24)
    lib.create(trainer, "m", rank=4, alpha=12.0)
    for seed in range(2):
        lib.run_one(trainer, lib.request("m", lib.random_data(seed)))
        lib.step(trainer, "m", learning_rate=0.02)
    exported = tmp_path_factory.mktemp("export")
    trainer.capture_weights("m")(str(exported))
    yield Pair(trainer, load_peft(model_path, {"m": exported}))
    trainer.close()


def check(pair: Pair, data: list[Datum], name: str, config: dict[str, float], directory: Path) -> None:
    pair.reference.zero_grad()
    losses, expected = [], []
    for datum in data:
        p = reference_logprobs(pair.reference, datum)
        loss = formula(name, p, datum, config)
        loss.backward()
        losses.append(loss.item())
        expected.append(p.detach().numpy())

    output = lib.run_one(pair.trainer, lib.request("m", data, name, config))
    gradient = lib.gradient(pair.trainer, "m", directory)
    lib.step(pair.trainer, "m", learning_rate=0.0)  # clears the gradient and changes nothing

    for datum, found, wanted in zip(data, lib.logprobs_of(output), expected, strict=True):
        if datum.loss_fn_inputs["target_tokens"].is_sparse:
            continue  # dense views differ where nothing is stored; compared by a test of its own
        assert lib.relative_error(found, wanted) < TOLERANCE
    assert output.metrics == {"loss:sum": pytest.approx(sum(losses), rel=1e-5, abs=1e-5)}
    reference = gradients_of(pair.reference, "m")
    assert gradient.keys() == reference.keys()
    assert any("lm_head" in key for key in gradient)
    for key, wanted in reference.items():
        assert np.abs(wanted).max() > 0, key
        assert lib.relative_error(gradient[key], wanted) < TOLERANCE, key


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_policy_losses_equal_peft(pair: Pair, name: str, tmp_path: Path) -> None:
    data = lib.random_data(5, (5, 17, 9), policy=True)
    if name == "gspo":
        random = np.random.default_rng(1)
        for datum in data:
            mask = random.integers(0, 2, datum.model_input.text_tokens().size).astype(np.float32)
            mask[0] = 1
            datum.loss_fn_inputs["sequence_ratio_mask"] = TensorData.from_numpy(mask)
    check(pair, data, name, CONFIGS.get(name, {}), tmp_path)


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_clip_thresholds_per_token_are_honoured(pair: Pair, name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    (datum,) = lib.random_data(6, (13,), policy=True)
    datum.loss_fn_inputs["clip_low_threshold"] = TensorData.from_numpy(random.uniform(0.2, 0.9, 13))
    datum.loss_fn_inputs["clip_high_threshold"] = TensorData.from_numpy(random.uniform(1.0, 1.5, 13))
    if name == "gspo":
        datum.loss_fn_inputs["sequence_ratio_mask"] = TensorData.from_numpy(np.ones(13, np.float32))
    check(pair, [datum], name, {}, tmp_path)


def test_cross_entropy_equals_peft(pair: Pair, tmp_path: Path) -> None:
    check(pair, lib.random_data(7), "cross_entropy", {}, tmp_path)


def test_cross_entropy_without_weights_counts_every_token_once(pair: Pair, tmp_path: Path) -> None:
    data = lib.random_data(8)
    for datum in data:
        del datum.loss_fn_inputs["weights"]
    check(pair, data, "cross_entropy", {}, tmp_path)


def as_csr(dense_array: np.ndarray) -> TensorData:
    rows, columns = np.nonzero(dense_array)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=dense_array.shape[0]))]).astype(np.int64)
    values = dense_array[rows, columns]
    dtype = TensorDType.FLOAT32 if values.dtype.kind == "f" else TensorDType.INT64
    return TensorData(
        dtype=dtype, shape=dense_array.shape, data=values, crow_indices=starts, col_indices=columns.astype(np.int64)
    )


@pytest.mark.parametrize("sparse", [(), ("target_tokens",), ("weights",), ("target_tokens", "weights")])
def test_soft_targets_equal_peft_dense_and_sparse(pair: Pair, sparse: tuple[str, ...], tmp_path: Path) -> None:
    random = np.random.default_rng(9)
    length, width = 11, 4
    targets = random.integers(0, 112, (length, width))
    soft = random.random((length, width)).astype(np.float32)
    soft[random.random((length, width)) < 0.5] = 0
    targets[soft == 0] = 0
    targets[3, 2], soft[3, 2] = 0, 0.7  # a real token 0, which CSR does not store
    arrays = {"target_tokens": targets, "weights": soft}
    inputs = {key: as_csr(value) if key in sparse else value for key, value in arrays.items()}
    datum = lib.datum(random.integers(0, 112, length), inputs.pop("target_tokens"), **inputs)
    check(pair, [datum, *lib.random_data(10, (6,))], "cross_entropy", {}, tmp_path)


def test_sparse_targets_are_answered_in_their_own_layout(pair: Pair) -> None:
    random = np.random.default_rng(11)
    targets = random.integers(1, 112, (7, 3))
    targets[random.random((7, 3)) < 0.4] = 0
    tokens = random.integers(0, 112, 7)
    weights = np.ones((7, 3), np.float32)
    (full,) = lib.run_one(
        pair.trainer, lib.request("m", [lib.datum(tokens, targets, weights=weights)], forward_only=True)
    ).loss_fn_outputs
    (stored,) = lib.run_one(
        pair.trainer, lib.request("m", [lib.datum(tokens, as_csr(targets), weights=weights)], forward_only=True)
    ).loss_fn_outputs
    found = stored["logprobs"]
    assert found.is_sparse
    assert found.shape == (7, 3)
    assert full["logprobs"].shape == (7, 3)
    np.testing.assert_allclose(found.data, full["logprobs"].to_numpy()[np.nonzero(targets)], rtol=1e-5)


def test_optimizer_equals_torch_over_ten_steps(model_path: Path, tmp_path: Path) -> None:
    trainer = lib.build_trainer(model_path)
    lib.create(trainer, "m", rank=2)
    first = lib.weights(trainer, "m", tmp_path / "start")
    mine = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in first.items()}
    optimizer = torch.optim.AdamW(mine.values(), fused=False, foreach=False)
    for index in range(10):
        params = {
            "learning_rate": 0.01 / (1 + index),
            "beta1": 0.8 + 0.01 * index,
            "beta2": 0.9 + 0.005 * index,
            "eps": 10.0 ** (-4 - index / 2),
            "weight_decay": 0.1 * (index % 3),
            "grad_clip_norm": [0.0, 0.5, 50.0][index % 3],
        }
        lib.run_one(trainer, lib.request("m", lib.random_data(index)))
        found = lib.gradient(trainer, "m", tmp_path / f"gradient-{index}")
        for key, parameter in mine.items():
            parameter.grad = torch.from_numpy(found[key.removeprefix("base_model.model.")])
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in mine.values()])
        if params["grad_clip_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(list(mine.values()), params["grad_clip_norm"])
        (group,) = optimizer.param_groups
        group.update(lr=params["learning_rate"], betas=(params["beta1"], params["beta2"]))
        group.update(eps=params["eps"], weight_decay=params["weight_decay"])
        optimizer.step()
        metrics = lib.step(trainer, "m", **params)
        assert metrics == {"grad_norm": pytest.approx(float(norm), rel=1e-5)}
    last = lib.weights(trainer, "m", tmp_path / "end")
    for key, value in last.items():
        assert lib.relative_error(value, mine[key].detach().numpy()) < TOLERANCE, key
        assert np.abs(value - first[key]).max() > 0


@pytest.fixture(scope="module")
def tenants(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Snapshots of three models of different rank that have taken one step."""
    trainer = lib.build_trainer(model_path)
    snapshots = {}
    for index, name in enumerate("abc"):
        lib.create(trainer, name, rank=RANKS[name], seed=index)
        lib.run_one(trainer, lib.request(name, lib.random_data(40 + index)))
        lib.step(trainer, name, learning_rate=0.01)
        snapshots[name] = tmp_path_factory.mktemp(f"tenant-{name}")
        trainer.capture(name, SnapshotParts())(str(snapshots[name]))
    return snapshots


RANKS = {"a": 4, "b": 8, "c": 2}


def one_pass(
    path: Path, tenants: dict[str, Path], directory: Path, *requests: PreparedModelPass, budget: int = 2048
) -> tuple[list, dict]:
    trainer = lib.build_trainer(path, micro_batch_tokens=budget)
    for name, snapshot in tenants.items():
        lib.create(trainer, name, rank=RANKS[name])
        trainer.restore(name, str(snapshot), SnapshotParts())
    results = lib.run_pass(trainer, *requests)
    gradients = {name: lib.gradient(trainer, name, directory / f"{name}-{budget}") for name in tenants}
    return [(result.output.metrics, lib.logprobs_of(result.output)) for result in results], gradients


def assert_same(left: tuple[list, dict], right: tuple[list, dict], names: str) -> None:
    """Within 1e-6 of the largest element: of each output, and of a model's whole gradient."""
    for index, name in enumerate(names):
        one, other = left[0][index], right[0][index]
        assert one[0] == pytest.approx(other[0], rel=1e-6, abs=1e-5)  # terms of both signs cancel
        for a, b in zip(one[1], other[1], strict=True):
            assert lib.relative_error(a, b) < 1e-6
        assert left[1][name].keys() == right[1][name].keys()
        if left[1][name]:
            rows = [np.concatenate([side[1][name][key].ravel() for key in left[1][name]]) for side in (left, right)]
            assert lib.relative_error(*rows) < 1e-6


def test_result_depends_on_neither_micro_batches_nor_tenants(
    model_path: Path, tenants: dict[str, Path], tmp_path: Path
) -> None:
    policy = lib.random_data(3, (30, 8, 2), policy=True)
    for datum in policy:
        size = datum.model_input.text_tokens().size
        datum.loss_fn_inputs["sequence_ratio_mask"] = TensorData.from_numpy(np.ones(size, np.float32))
    requests = (
        lib.request("a", lib.random_data(1, (40, 3, 11, 7))),
        lib.request("b", lib.random_data(2, (5, 60)), forward_only=True),
        lib.request("c", policy, "gspo", CONFIGS["gspo"]),
    )
    together = one_pass(model_path, tenants, tmp_path / "together", *requests)
    assert together[1]["b"] == {}
    assert_same(together, one_pass(model_path, tenants, tmp_path / "small", *requests, budget=13), "abc")
    for index, name in enumerate("abc"):
        alone = one_pass(model_path, tenants, tmp_path / name, requests[index])
        assert_same(([together[0][index]], together[1]), alone, name)


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_result_does_not_depend_on_chunks_of_the_vocabulary(
    model_path: Path, tenants: dict[str, Path], tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = (lib.request("a", lib.random_data(1, (40, 3, 11, 7))), lib.request("b", lib.random_data(2, (5, 60))))
    whole = one_pass(model_path, tenants, tmp_path / "whole", *requests)
    monkeypatch.setattr("tinker_core.training.logprobs._CHUNK_BYTES", {"cpu": rows * 112 * 4})
    assert_same(whole, one_pass(model_path, tenants, tmp_path / "chunks", *requests), "ab")


def test_forward_equals_forward_backward(pair: Pair) -> None:
    data = lib.random_data(20)
    both = [lib.run_one(pair.trainer, lib.request("m", data, forward_only=only)) for only in (True, False)]
    lib.step(pair.trainer, "m", learning_rate=0.0)
    assert both[0].metrics == both[1].metrics
    for left, right in zip(*map(lib.logprobs_of, both), strict=True):
        np.testing.assert_array_equal(left, right)
