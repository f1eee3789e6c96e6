"""Training of all parameters in every kind of world: gradients and steps against Hugging Face, and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest

from tests.megatron.full_lab import FULL, FullLab, read_state
from tests.megatron.full_reference import Reference
from tests.megatron.groups import megatron_spec
from tests.models import Kind, write_tiny_model
from tinker_core.errors import CheckpointMismatchError, ConfigurationError, InvalidLoraConfigError
from tinker_core.interfaces import OptionValue
from tinker_core.testing import start_group
from tinker_core.testing.trainer_lab import assert_close, assert_identical
from tinker_core.types import AdamParams

pytestmark = pytest.mark.slow

TENSOR, PIPELINE, EXPERT = {"tensor-parallel": 2}, {"pipeline-parallel": 2}, {"expert-parallel": 2}
SEQUENCE = {**TENSOR, "sequence-parallel": True}
WORLDS: Mapping[str, tuple[int, Kind, bool, Mapping[str, OptionValue]]] = {
    "one rank, untied": (1, "llama", False, {}),
    "one rank, biases": (1, "qwen2", True, {}),
    "tensor parallel, untied": (2, "llama", False, TENSOR),
    "data parallel": (2, "qwen2", True, {}),
    "sequence parallel": (2, "qwen3", True, SEQUENCE),
    "context parallel": (2, "qwen3", True, {"context-parallel": 2}),
    "pipeline, tied": (2, "qwen3", True, PIPELINE),
    "pipeline, untied": (2, "llama", False, PIPELINE),
    "tensor, sequence and pipeline, tied": (4, "qwen2", True, {**SEQUENCE, **PIPELINE}),
    "experts": (1, "qwen3_moe", False, {}),
    "expert parallel": (2, "qwen3_moe", True, EXPERT),
    "expert and sequence parallel": (2, "qwen3_moe", False, {**SEQUENCE, **EXPERT}),
}


@pytest.mark.parametrize("world", WORLDS)
def test_a_world_trains_as_torch_does_and_its_checkpoints_come_back(world: str, tmp_path: Path) -> None:
    num_ranks, kind, tie, options = WORLDS[world]
    base = write_tiny_model(tmp_path / "base", kind, tie=tie)
    with start_group(megatron_spec(base, num_ranks, {**FULL, **options})) as group:
        lab, reference = FullLab(group, tmp_path), Reference(base)
        model_id = lab.new()
        for seed in (0, 1):
            output = lab.run_one(lab.request(model_id, lab.data(seed)))
            assert output.metrics["loss:sum"] == pytest.approx(reference.backward(lab.data(seed)), rel=1e-5)
        assert_close(lab.gradient(model_id), reference.gradient, 1e-5)
        for seed, clip in ((2, 0.5), (3, 0.0)):
            params = AdamParams(learning_rate=0.01, eps=1e-3, weight_decay=0.1, grad_clip_norm=clip)
            norm = lab.step(model_id, **attrs.asdict(params))["grad_norm"]
            assert norm == pytest.approx(reference.step(params), rel=1e-5)
            lab.run_one(lab.request(model_id, lab.data(seed)))
            reference.backward(lab.data(seed))
        assert_close(lab.weights(model_id), reference.weights, 1e-5)
        saved = lab.snapshot(model_id, gradient=True)
        model_id = lab.anew(model_id)
        assert_identical(lab.weights(model_id), Reference(base).weights)
        lab.restore(model_id, saved, gradient=True)
        assert_identical(read_state(lab.snapshot(model_id, gradient=True)), read_state(saved))


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("qwen2", (2, PIPELINE), (2, TENSOR)),
        ("llama", (2, SEQUENCE), (1, {})),
        ("qwen3_moe", (2, EXPERT), (2, PIPELINE)),
    ],
)
def test_a_checkpoint_of_one_world_is_the_same_in_another(
    kind: Kind,
    first: tuple[int, Mapping[str, OptionValue]],
    second: tuple[int, Mapping[str, OptionValue]],
    tmp_path: Path,
) -> None:
    base, states = write_tiny_model(tmp_path / "base", kind, tie=True), []
    saved: Path | None = None
    for num_ranks, options in (first, second):
        with start_group(megatron_spec(base, num_ranks, {**FULL, **options})) as group:
            lab = FullLab(group, tmp_path)
            model_id = lab.new()
            if saved is None:
                lab.train(model_id, 0, 1)
                lab.run_one(lab.request(model_id, lab.data(2)))
            else:
                lab.restore(model_id, saved, gradient=True)
            saved = lab.snapshot(model_id, gradient=True)
            states.append(read_state(saved))
    assert_identical(*states)


def test_bfloat16_computes_with_a_copy_of_float32_weights(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama")
    with start_group(megatron_spec(base, 1, FULL, dtype="bfloat16")) as group:
        lab = FullLab(group, tmp_path)
        model_id = lab.new()
        start = lab.weights(model_id)
        assert_identical(start, Reference(base).weights)
        for seed in range(8):
            # Each step is too small to show in bfloat16; all of them together are not.
            lab.train(model_id, seed, learning_rate=1e-5)
        assert_close(lab.weights(model_id), start, 1e-3)
        changed = [name for name, array in lab.weights(model_id).items() if (array != start[name]).mean() > 0.5]
        assert len(changed) == len(start)
        exported = lab.export(model_id)
        assert str(Reference(exported).model.config.dtype) == "torch.float32"  # as asked for, of a bfloat16 file
        assert '"dtype": "bfloat16"' in (exported / "config.json").read_text()


def test_a_server_for_adapters_refuses_rank_0_and_checkpoints_of_whole_models(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama")
    with start_group(megatron_spec(base, 1, FULL)) as group:
        whole = FullLab(group, tmp_path)
        saved = whole.snapshot(whole.new())
    with start_group(megatron_spec(base, 1, {})) as group:
        lab = FullLab(group, tmp_path)
        assert not lab.capabilities.full_parameter
        with pytest.raises(InvalidLoraConfigError, match=r"--full-parameter"):
            lab.new()
        with pytest.raises(CheckpointMismatchError, match="LoRA rank 0"):
            lab.restore(lab.create(), saved)


def test_weights_that_a_bridge_reads_are_refused(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama")
    options = {**FULL, "weights-bridge": "mbridge"}
    with (
        pytest.raises(ConfigurationError, match="leave --weights-bridge out"),
        start_group(megatron_spec(base, 1, options)),
    ):
        pass
