"""Pipelines and sequence parallelism beside one rank that has the whole model.

Megatron-Core runs both on CPUs only with the shim of `cpu_shim`; nothing here says anything about NCCL.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.megatron.groups import start_megatron
from tests.megatron.loaded_modules import CUDA_IS_AS_IT_WAS, LOADED, LOSS
from tests.models import write_tiny_model
from tinker_backend_megatron import cpu_shim
from tinker_backend_megatron.architecture import plan_topology
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import RankContext
from tinker_core.testing import BlockingGroup
from tinker_core.testing.faults import FAILING_LOSS
from tinker_core.testing.trainer_lab import (
    Arrays,
    TrainerLab,
    assert_close,
    assert_same_output,
    error_of,
    output_of,
    read_safetensors,
)
from tinker_core.types import BaseModelSpec, PreparedModelPass

TOLERANCE = 2e-6
WORLDS: dict[str, tuple[int, dict[str, Any], int]] = {
    "pipeline, a datum in each micro-batch": (2, {"pipeline-parallel": 2}, 8),
    "pipeline, all data in one micro-batch": (2, {"pipeline-parallel": 2}, 4096),
    "sequence parallel": (2, {"tensor-parallel": 2, "sequence-parallel": True}, 24),
}
"""Ranks, options and tokens of a micro-batch."""
EVERY_DAY = ("pipeline, a datum in each micro-batch",)
world_names = [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in WORLDS]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingGroup]:
    with start_tied(tmp_path_factory.mktemp("alone"), 1, {}, 4096) as group:
        yield group


@pytest.fixture(scope="module", params=world_names)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingGroup]:
    with start_tied(tmp_path_factory.mktemp("model"), *WORLDS[request.param]) as group:
        yield group


def start_tied(
    directory: Path, num_ranks: int, options: dict[str, Any], budget: int
) -> AbstractContextManager[BlockingGroup]:
    return start_megatron(directory, "qwen3", num_ranks, options, tie=True, num_layers=4, micro_batch_tokens=budget)


@pytest.fixture
def labs(group: BlockingGroup, alone: BlockingGroup, tmp_path: Path) -> Iterator[tuple[TrainerLab, TrainerLab]]:
    """Of the world under test, and of one rank."""
    labs = TrainerLab(group, tmp_path), TrainerLab(alone, tmp_path)
    yield labs
    for lab in labs:
        lab.close()


def gradient(lab: TrainerLab, model_id: str) -> Arrays:
    return read_safetensors(lab.snapshot(model_id, gradient=True) / "gradient.safetensors")


def weights(lab: TrainerLab, model_id: str) -> Arrays:
    return read_safetensors(lab.export(model_id) / "adapter_model.safetensors")


def tenants(lab: TrainerLab, models: list[str]) -> list[PreparedModelPass]:
    """Different losses; the third only wants logprobs, so that a pass has micro-batches with gradient and without."""
    return [
        lab.request(models[0], lab.data(0)),
        lab.request(models[1], lab.data(1, (3, 11, 40), policy=True), "importance_sampling"),
        lab.request(models[2], lab.data(2, (23, 2)), forward_only=True),
    ]


def test_tenants_get_what_one_rank_finds_however_their_data_are_cut(labs: tuple[TrainerLab, TrainerLab]) -> None:
    outputs, gradients, metrics, trained = [], [], [], []
    for lab in labs:
        models = [lab.create(rank=4, seed=1), lab.create(rank=8, seed=2), lab.create(rank=2, seed=3)]
        for model in models:
            lab.train(model, 7)  # else B is 0, and with it the gradient of A
        outputs.append([output_of(result) for result in lab.run(*tenants(lab, models))])
        gradients.append([gradient(lab, model) for model in models])
        metrics.append([lab.step(model, learning_rate=0.01, grad_clip_norm=0.1) for model in models[:2]])
        trained.append([weights(lab, model) for model in models])
    for found, expected in zip(*outputs, strict=True):
        assert_same_output(found, expected, TOLERANCE)
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, TOLERANCE)
    assert not gradients[0][2]
    for found, expected in zip(*metrics, strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)
    for found, expected in zip(*trained, strict=True):
        assert_close(found, expected, 100 * TOLERANCE)  # Adam divides gradients by their own size


def test_an_adapter_of_which_most_ranks_may_hold_nothing_trains_and_restores(
    labs: tuple[TrainerLab, TrainerLab],
) -> None:
    only_head = {"train_attn": False, "train_mlp": False}
    found = []
    for lab in labs:
        model, copy = lab.create(**only_head), lab.create(seed=2, **only_head)
        lab.train(model, 1, 2, grad_clip_norm=0.1)
        lab.restore(copy, lab.snapshot(model))
        lab.train(copy, 3)
        found.append(weights(lab, copy))
    assert_close(found[0], found[1], 100 * TOLERANCE)


def test_a_loss_that_fails_in_one_of_many_micro_batches_leaves_the_ranks_in_step(
    labs: tuple[TrainerLab, TrainerLab],
) -> None:
    lab = labs[0]
    good, bad = lab.create(), lab.create(seed=2)
    wanted = lab.request(good, lab.data(5))
    alone = lab.run_one(wanted)
    clean = gradient(lab, good)
    for _ in range(2):
        fine, failed = lab.run(wanted, lab.request(bad, lab.data(6), FAILING_LOSS))
        assert_same_output(output_of(fine), alone, TOLERANCE)
        assert "fails in backward" in error_of(failed).message
    assert_close(gradient(lab, good), {name: 3 * array for name, array in clean.items()}, TOLERANCE)
    assert not gradient(lab, bad)


def test_ranks_have_the_shim_and_their_torch_is_as_it_was(labs: tuple[TrainerLab, TrainerLab]) -> None:
    shimmed, plain = (lab.run_one(lab.request(lab.create(), lab.data(0), LOSS)).metrics for lab in labs)
    assert (shimmed[LOADED], plain[LOADED]) == (1, 0)
    assert shimmed[CUDA_IS_AS_IT_WAS] == plain[CUDA_IS_AS_IT_WAS] == 1


@pytest.fixture
def megatron_modules(monkeypatch: pytest.MonkeyPatch) -> list[ModuleType]:
    """Those that the shim changes, here for one test only."""
    modules = [importlib.import_module(name) for name in cpu_shim.CPU_MODULES]
    for module in modules:
        monkeypatch.setattr(module, "torch", torch)
    return modules


def test_the_shim_is_refused_where_cuda_exists_and_changes_nothing(
    megatron_modules: list[ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigurationError, match=r"pipeline parallelism on CPUs .*--device cuda"):
        cpu_shim.install("pipeline parallelism", announce=True)
    assert all(module.torch is torch for module in megatron_modules)


def test_the_shim_says_once_that_it_is_there(
    megatron_modules: list[ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        cpu_shim.install("pipeline parallelism", announce=True)
    (line,) = caplog.messages
    assert line.startswith("pipeline parallelism: Megatron-Core takes the CPU for its CUDA device")
    assert all(module.torch.cuda.current_device() == torch.device("cpu") for module in megatron_modules)


@pytest.mark.parametrize(
    ("world_size", "options", "message"),
    [
        (3, {"pipeline-parallel": 3}, r"--pipeline-parallel 3 does not divide this model's 4 layers; .*: 1, 2, 4"),
        (3, {"tensor-parallel": 3}, r"--tensor-parallel 3 does not divide this model's 4 attention heads .*: 1, 2"),
        (3, {"pipeline-parallel": 2}, r"3 ranks cannot be divided: .*a multiple of 2; set --num-ranks to one"),
        (1, {"sequence-parallel": True}, r"--sequence-parallel needs --tensor-parallel of at least 2"),
    ],
)
def test_a_division_that_cannot_be_is_refused_with_what_can(
    tmp_path: Path, world_size: int, options: dict[str, Any], message: str
) -> None:
    context = RankContext(
        base_model=BaseModelSpec(name="tiny", path=str(write_tiny_model(tmp_path, "llama", num_layers=4))),
        rank=0,
        world_size=world_size,
        rendezvous="file:///unused",
        device="cpu",
        dtype="float32",
        options=options,
    )
    with pytest.raises(ConfigurationError, match=message):
        plan_topology(context)
