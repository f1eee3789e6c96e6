"""What the fsdp trainer does beyond the contract."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fsdp import in_process as lib
from tests.models import write_tiny_model
from tinker_backend_fsdp.trainer import FsdpTrainer
from tinker_core.errors import (
    CheckpointMismatchError,
    ConfigurationError,
    InvalidLoraConfigError,
    UnsupportedFeatureError,
)
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import start_group
from tinker_core.types import (
    BaseModelSpec,
    LoraConfig,
    OptimizerConfig,
    PreparedModel,
    PreparedModelPassBatch,
    SnapshotParts,
    Transport,
    WeightsRef,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama", tie=True)


@pytest.fixture
def trainer(model_path: Path) -> FsdpTrainer:
    return lib.build_trainer(model_path)


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ATTENTION | MLP | {"lm_head"}),
        ({"train_unembed": False}, ATTENTION | MLP),
        ({"train_mlp": False, "train_unembed": False}, ATTENTION),
        ({"train_attn": False, "train_unembed": False}, MLP),
        ({"train_attn": False, "train_mlp": False}, {"lm_head"}),
        ({"target_modules": ("q_proj", "lm_head")}, {"q_proj", "lm_head"}),
    ],
)
def test_an_adapter_changes_the_modules_it_is_asked_to(
    trainer: FsdpTrainer, tmp_path: Path, config: dict, expected: set[str]
) -> None:
    lib.create(trainer, "m", alpha=8.0, **config)
    names = {key.split(".")[-3] for key in lib.weights(trainer, "m", tmp_path)}
    assert names == expected
    peft = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (set(peft["target_modules"]), peft["r"], peft["lora_alpha"]) == (expected, 4, 8.0)
    lib.run_one(trainer, lib.request("m", lib.random_data(0)))
    assert {key.split(".")[-3] for key in lib.gradient(trainer, "m", tmp_path / "g")} == expected


def test_an_unknown_target_module_is_refused_with_the_known_ones(trainer: FsdpTrainer) -> None:
    with pytest.raises(InvalidLoraConfigError, match=r"c_attn.*down_proj, gate_proj"):
        lib.create(trainer, "m", target_modules=("c_attn",))


def test_alpha_scales_the_update(trainer: FsdpTrainer, tmp_path: Path) -> None:
    for name, alpha in (("one", 4.0), ("two", 8.0)):
        lib.create(trainer, name, alpha=alpha)
        lib.run_one(trainer, lib.request(name, lib.random_data(0)))
    one, two = (lib.gradient(trainer, name, tmp_path / name) for name in ("one", "two"))
    for key, value in one.items():
        np.testing.assert_allclose(two[key], 2 * value, rtol=1e-4, atol=1e-5)


def test_an_optimizer_that_is_not_installed_is_refused(trainer: FsdpTrainer) -> None:
    model = PreparedModel(
        model_id="m", lora_config=LoraConfig(rank=2, seed=0), optimizer_config=OptimizerConfig(type="dimuon")
    )
    with pytest.raises(UnsupportedFeatureError, match=r"dimuon.*adamw"):
        trainer.create(model)


def test_checkpoints_of_other_bases_modules_or_without_optimizer_are_refused(
    trainer: FsdpTrainer, tmp_path: Path
) -> None:
    lib.create(trainer, "saved")
    trainer.capture_weights("saved")(str(tmp_path))
    lib.create(trainer, "other", train_mlp=False)
    with pytest.raises(CheckpointMismatchError, match="target modules"):
        trainer.restore("other", str(tmp_path), SnapshotParts(optimizer=False))
    with pytest.raises(CheckpointMismatchError, match="no optimizer state"):
        trainer.restore("saved", str(tmp_path), SnapshotParts(optimizer=True))
    manifest = json.loads((tmp_path / "tinker.json").read_text())
    (tmp_path / "tinker.json").write_text(json.dumps({**manifest, "base_model": "another"}))
    with pytest.raises(CheckpointMismatchError, match="base model 'another'"):
        trainer.restore("saved", str(tmp_path), SnapshotParts(optimizer=False))
    handle = trainer.model_handle()
    with pytest.raises(CheckpointMismatchError, match="base model 'another'"):
        handle.copy_adapter(WeightsRef(transport=Transport.FILE, directory=str(tmp_path)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copied_adapter_does_not_change_and_survives_a_round_trip(
    model_path: Path, tmp_path: Path, dtype: str
) -> None:
    trainer = lib.build_trainer(model_path, dtype=dtype)
    lib.create(trainer, "m")
    handle = trainer.model_handle()
    copy = handle.copy_adapter(WeightsRef(transport=Transport.IN_PROCESS, model_id="m"))
    before = copy.row.clone()
    lib.run_one(trainer, lib.request("m", lib.random_data(0)))
    lib.step(trainer, "m", learning_rate=0.1)
    assert copy.row.equal(before)
    assert (
        not trainer.model_handle()
        .copy_adapter(WeightsRef(transport=Transport.IN_PROCESS, model_id="m"))
        .row.equal(before)
    )
    handle.capture_adapter(copy)(str(tmp_path))
    again = handle.copy_adapter(WeightsRef(transport=Transport.FILE, directory=str(tmp_path)))
    assert again.row.equal(before)
    assert again.row.dtype == handle.dtype


def test_a_pass_yields_once_per_micro_batch(model_path: Path) -> None:
    trainer = lib.build_trainer(model_path, micro_batch_tokens=10)
    lib.create(trainer, "m")
    one = lib.request("m", lib.random_data(0, (10, 4, 6, 3, 12)))
    assert len(list(trainer.forward_backward(PreparedModelPassBatch(requests=(one,))))) == 4


def test_bfloat16_is_close_to_float32_and_learns(model_path: Path) -> None:
    tokens = np.arange(40, 60)
    data = [lib.datum(tokens[:-1], tokens[1:])]
    first = {}
    for dtype in ("float32", "bfloat16"):
        trainer = lib.build_trainer(model_path, dtype=dtype)
        lib.create(trainer, "m")
        first[dtype] = lib.run_one(trainer, lib.request("m", data))
        for _ in range(10):
            lib.step(trainer, "m", learning_rate=0.02)
            output = lib.run_one(trainer, lib.request("m", data))
        assert output.metrics["loss:sum"] < 0.5 * first[dtype].metrics["loss:sum"]
    exact, rounded = (lib.logprobs_of(first[dtype])[0] for dtype in ("float32", "bfloat16"))
    assert np.abs(exact - rounded).max() < 0.15


def test_two_ranks_compute_what_one_computes(model_path: Path, tmp_path: Path) -> None:
    data = lib.random_data(3, (30, 2, 17, 5, 9))
    alone = lib.build_trainer(model_path, micro_batch_tokens=20)
    lib.create(alone, "m")
    expected = lib.run_one(alone, lib.request("m", data))
    spec = WorkerGroupSpec(
        base_model=BaseModelSpec(name="tiny", path=str(model_path)),
        trainer="fsdp",
        sampler=None,
        plugins=("core", "fsdp"),
        num_ranks=2,
        device="cpu",
        dtype="float32",
        micro_batch_tokens=20,
        environment={"OMP_NUM_THREADS": "1"},
    )
    with start_group(spec) as group:
        lora = LoraConfig(rank=4, seed=1)
        group.call("create", PreparedModel(model_id="m", lora_config=lora, optimizer_config=OptimizerConfig()))
        (result,) = group.call("forward_backward", PreparedModelPassBatch(requests=(lib.request("m", data),)))
    assert result.output.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-6)
    for found, wanted in zip(lib.logprobs_of(result.output), lib.logprobs_of(expected), strict=True):
        assert lib.relative_error(found, wanted) < 1e-6


def edit_config(path: Path, copy: Path, **changes: object) -> Path:
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'.*supported: llama, qwen2, qwen3"),
        ({"model_type": "no-such-type"}, "no-such-type"),
        ({"num_hidden_layers": 3}, "lack .* tensors"),
        ({"hidden_size": 64}, "lack .* tensors|mismatch|size"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)
def test_a_base_model_that_cannot_be_run_is_refused_with_the_reason(
    model_path: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        lib.build_trainer(edit_config(model_path, tmp_path / "copy", **changes))


def test_weights_that_are_a_pickle_are_refused(model_path: Path, tmp_path: Path) -> None:
    copy = edit_config(model_path, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    torch.save(load_file(model_path / "model.safetensors"), copy / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="safetensors"):
        lib.build_trainer(copy)


def test_memory_of_written_copies_is_used_again_and_bounded(trainer: FsdpTrainer, tmp_path: Path) -> None:
    for name, rank in (("small", 2), ("large", 4)):
        lib.create(trainer, name, rank=rank)
        lib.run_one(trainer, lib.request(name, lib.random_data(0)))
        lib.step(trainer, name, learning_rate=0.1)
    captured = [trainer.capture(name, SnapshotParts()) for name in ("large", "small", "large")]
    for index, write in enumerate(captured):
        (tmp_path / str(index)).mkdir()
        write(str(tmp_path / str(index)))
    kept = {copy.data_ptr() for copy in trainer._copies._free}
    assert len(kept) == 3
    lib.step(trainer, "large", learning_rate=0.1)
    write = trainer.capture("large", SnapshotParts())
    assert trainer._copies._free == []
    (tmp_path / "again").mkdir()
    write(str(tmp_path / "again"))
    assert {copy.data_ptr() for copy in trainer._copies._free} == kept
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("2", "again"))
    assert any(not first[key].equal(again[key]) for key in first)


def test_a_checkpoint_of_another_type_or_without_a_part_is_refused(trainer: FsdpTrainer, tmp_path: Path) -> None:
    lib.create(trainer, "m")
    lib.run_one(trainer, lib.request("m", lib.random_data(0)))
    lib.step(trainer, "m", learning_rate=0.1)
    before = lib.weights(trainer, "m", tmp_path / "before")
    saved = tmp_path / "saved"
    saved.mkdir()
    trainer.capture("m", SnapshotParts(optimizer=True, gradient=False))(str(saved))
    with pytest.raises(CheckpointMismatchError, match="no accumulated gradient"):
        trainer.restore("m", str(saved), SnapshotParts(optimizer=True, gradient=True))
    moments = load_file(saved / "optimizer.safetensors")
    save_file({key: value for key, value in moments.items() if "sq" not in key}, saved / "optimizer.safetensors")
    with pytest.raises(CheckpointMismatchError, match="exp_avg_sq"):
        trainer.restore("m", str(saved), SnapshotParts())
    half = {key: value.half() for key, value in load_file(saved / "adapter_model.safetensors").items()}
    save_file(half, saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointMismatchError, match="float16"):
        trainer.restore("m", str(saved), SnapshotParts(optimizer=False))
    for key, value in lib.weights(trainer, "m", tmp_path / "after").items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize(("setting", "value"), [("dtype", "float8"), ("device", "tpu"), ("micro_batch_tokens", 0)])
def test_a_setting_that_cannot_work_is_refused(model_path: Path, setting: str, value: object) -> None:
    with pytest.raises(ConfigurationError):
        lib.build_trainer(model_path, **{setting: value})


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        lib.build_trainer(tmp_path)


def test_hooks_import_nothing_heavy() -> None:
    script = (
        "import sys, tinker_backend_fsdp.hooks as h\n"
        "h.tinker_register_trainer(print)\n"
        "sys.exit(sorted({'torch', 'transformers', 'tinker_backend_fsdp.trainer'} & set(sys.modules)) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
