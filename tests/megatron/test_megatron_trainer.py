"""What the megatron trainer does beyond the contract, and how it begins, in the tests' own process."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fsdp import in_process as lib
from tests.fsdp.test_fsdp_trainer import edit_config
from tests.megatron.groups import megatron_spec
from tests.models import write_tiny_model
from tinker_core.errors import CheckpointMismatchError, ConfigurationError
from tinker_core.executors.build import build_rank, rank_context
from tinker_core.interfaces import Trainer
from tinker_core.types import SnapshotParts

Build = Callable[..., Trainer]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama", tie=True)


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Builds a trainer as a rank does; only one lives at a time."""
    trainers: list[Trainer] = []
    numbers = itertools.count()

    def make(path: Path, **settings: Any) -> Trainer:
        for old in trainers:
            old.close()
        trainers.clear()
        spec = megatron_spec(path, 1, settings.pop("options", {}), **settings)
        # A name of its own: the store of an earlier group takes its file away when it is collected.
        trainer, _ = build_rank(spec, rank_context(spec, 0, f"file://{tmp_path / f'rendezvous-{next(numbers)}'}"))
        trainers.append(trainer)
        return trainer

    yield make
    for trainer in trainers:
        trainer.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'.*supported: llama, qwen2, qwen3"),
        ({"model_type": "no-such-type"}, "no-such-type"),
        ({"num_hidden_layers": 3}, "lack 'model.layers.2"),
        ({"hidden_size": 64, "head_dim": 8}, r"embed_tokens.weight.* has shape \[112, 32\], not \[112, 64\]"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'.*yarn"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized; give a directory with plain weights"),
        ({"hidden_act": "gelu"}, "activation 'gelu'; supported: silu"),
        ({"mlp_bias": True}, "mlp_bias, which needs --backend fsdp"),
    ],
)
def test_a_base_model_that_cannot_be_run_is_refused_with_the_reason(
    build: Build, model_path: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(edit_config(model_path, tmp_path / "copy", **changes))


def test_weights_that_are_a_pickle_are_refused(build: Build, model_path: Path, tmp_path: Path) -> None:
    copy = edit_config(model_path, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    torch.save(load_file(model_path / "model.safetensors"), copy / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="safetensors"):
        build(copy)


def test_a_directory_without_a_model_is_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("dtype", "float8", "'float8' is not supported; use float32 or bfloat16"),
        ("device", "tpu", "'tpu' is not known; use cpu or cuda"),
        ("micro_batch_tokens", 0, "micro-batch-tokens must be at least 1"),
        ("options", {"tensor-parallel": 2}, "1 ranks cannot be divided.*--tensor-parallel 2.*multiple of 2"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    build: Build, model_path: Path, setting: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(model_path, **{setting: value})


def test_a_failed_start_leaves_nothing_behind(build: Build, model_path: Path, tmp_path: Path) -> None:
    """A process group that stayed would make the next start in this process fail."""
    with pytest.raises(ConfigurationError):
        build(edit_config(model_path, tmp_path / "copy", num_hidden_layers=3))
    trainer = build(model_path)
    lib.create(trainer, "m")
    lib.run_one(trainer, lib.request("m", lib.random_data(0)))


def test_checkpoints_of_other_bases_modules_or_without_optimizer_are_refused(
    build: Build, model_path: Path, tmp_path: Path
) -> None:
    trainer = build(model_path)
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


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(build: Build, model_path: Path, tmp_path: Path) -> None:
    trainer = build(model_path)
    lib.create(trainer, "m")
    lib.run_one(trainer, lib.request("m", lib.random_data(0)))
    lib.step(trainer, "m", learning_rate=0.1)
    before = lib.weights(trainer, "m", tmp_path / "before")
    saved = tmp_path / "saved"
    saved.mkdir()
    trainer.capture("m", SnapshotParts())(str(saved))
    half = {key: value.half() for key, value in load_file(saved / "adapter_model.safetensors").items()}
    save_file(half, saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointMismatchError, match="float16"):
        trainer.restore("m", str(saved), SnapshotParts(optimizer=False))
    for key, value in lib.weights(trainer, "m", tmp_path / "after").items():
        np.testing.assert_array_equal(value, before[key])


def test_hooks_and_topology_import_nothing_heavy() -> None:
    script = (
        "import sys, tinker_backend_megatron.hooks as h\n"
        "h.tinker_register_trainer(print)\n"
        "sys.exit(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_without_megatron_core_the_hooks_work_and_a_start_says_what_to_install(model_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['megatron'] = None\n"
        "from pathlib import Path\n"
        "from tests.megatron.groups import megatron_spec\n"
        "from tinker_core import Plugins\n"
        "from tinker_core.errors import ConfigurationError\n"
        "from tinker_core.executors.build import build_rank, rank_context\n"
        "assert 'megatron' in Plugins.load('core', 'megatron').trainers()\n"
        "spec = megatron_spec(Path(sys.argv[1]), 1, {})\n"
        "try:\n"
        "    build_rank(spec, rank_context(spec, 0, ''))\n"
        "except ConfigurationError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(model_path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert "needs Megatron-Core" in done.stdout
    assert "pip install 'megatron-core>=0.16,<0.20'" in done.stdout


def test_a_rank_says_nothing_when_all_is_well(model_path: Path, tmp_path: Path) -> None:
    """Not of Apex, of Transformer Engine, nor of its own FSDP: none of which this backend uses on this machine."""
    script = (
        "import logging, sys\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "from pathlib import Path\n"
        "from tests.fsdp import in_process as lib\n"
        "from tests.megatron.groups import megatron_spec\n"
        "from tinker_core.executors.build import build_rank, rank_context\n"
        "spec = megatron_spec(Path(sys.argv[1]), 1, {})\n"
        "trainer, _ = build_rank(spec, rank_context(spec, 0, sys.argv[2]))\n"
        "lib.create(trainer, 'm')\n"
        "lib.run_one(trainer, lib.request('m', lib.random_data(0)))\n"
        "lib.step(trainer, 'm', learning_rate=0.1)\n"
        "trainer.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(model_path), f"file://{tmp_path / 'rendezvous'}"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (done.stdout, done.stderr) == ("", "")
