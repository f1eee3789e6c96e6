"""Training of all parameters by one tenant: numbers against Hugging Face, and the promises of a trainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np
import pytest

from tests.megatron.full_lab import FULL, PARTS, FullLab, read_state
from tests.megatron.full_reference import Reference
from tests.megatron.groups import megatron_spec
from tests.models import write_tiny_model
from tinker_core.errors import (
    CapacityError,
    CheckpointMismatchError,
    InvalidLoraConfigError,
    StorageError,
    TinkerError,
    WorkerLostError,
)
from tinker_core.executors.protocol import StateCall
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.faults import FAILING_LOSS
from tinker_core.testing.trainer_lab import (
    assert_close,
    assert_identical,
    assert_same_output,
    error_of,
    logprobs_of,
    output_of,
    read_safetensors,
)
from tinker_core.types import AdamParams


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), "qwen3", tie=True)


@pytest.fixture(scope="module")
def one_rank(base: Path) -> Iterator[BlockingGroup]:
    with start_group(megatron_spec(base, 1, FULL)) as group:
        yield group


@pytest.fixture(scope="module")
def two_ranks(base: Path) -> Iterator[BlockingGroup]:
    with start_group(megatron_spec(base, 2, {**FULL, "tensor-parallel": 2})) as group:
        yield group


@pytest.fixture(params=["two_ranks", pytest.param("one_rank", marks=pytest.mark.slow)])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FullLab]:
    lab = FullLab(request.getfixturevalue(request.param), tmp_path)
    yield lab
    lab.close()


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_gradients_of_all_parameters_are_those_of_autograd_and_add_up(lab: FullLab, base: Path) -> None:
    model_id, reference = lab.new(), Reference(base)
    for seed in (0, 1):
        output = lab.run_one(lab.request(model_id, lab.data(seed)))
        assert output.metrics["loss:sum"] == pytest.approx(reference.backward(lab.data(seed)), rel=1e-5)
    assert_close(lab.gradient(model_id), reference.gradient, 1e-5)


def test_steps_are_those_of_torch_on_the_whole_model(lab: FullLab, base: Path) -> None:
    model_id, reference = lab.new(), Reference(base)
    for seed, clip in enumerate((0.0, 0.5, 1e6)):
        params = AdamParams(
            learning_rate=0.01, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1 * seed, grad_clip_norm=clip
        )
        lab.run_one(lab.request(model_id, lab.data(seed)))
        reference.backward(lab.data(seed))
        assert lab.step(model_id, **attrs.asdict(params))["grad_norm"] == pytest.approx(
            reference.step(params), rel=1e-5
        )
        assert lab.gradient(model_id) == {}
    assert_close(lab.weights(model_id), reference.weights, 1e-5)
    data = lab.data(7)
    output = lab.run_one(lab.request(model_id, data, forward_only=True))
    for found, datum in zip(logprobs_of(output), data, strict=True):
        np.testing.assert_allclose(found, reference.logprobs(datum).detach().numpy(), atol=1e-4)


def test_a_policy_loss_of_several_micro_batches_gives_what_one_datum_at_a_time_gives(lab: FullLab) -> None:
    model_id, data = lab.new(), lab.data(3, policy=True)
    lab.run_one(lab.request(model_id, data, "importance_sampling"))
    joined = lab.gradient(model_id)
    model_id = lab.anew(model_id)
    for datum in data:
        lab.run_one(lab.request(model_id, [datum], "importance_sampling"))
    assert_close(lab.gradient(model_id), joined, 1e-5)


# --- atomicity --------------------------------------------------------------------------------------------------------


def test_requests_that_fail_change_nothing_and_the_next_in_the_same_pass_succeeds(lab: FullLab) -> None:
    model_id = lab.new()
    lab.train(model_id, 0)
    lab.run_one(lab.request(model_id, lab.data(1)))
    before = lab.state(model_id)
    (datum,) = lab.data(4, (6,), policy=True)
    extreme = datum.loss_fn_inputs["logprobs"].with_data(np.full(6, -1e4, np.float32))
    infinite = attrs.evolve(datum, loss_fn_inputs={**datum.loss_fn_inputs, "logprobs": extreme})
    failing = [
        lab.request(model_id, (*lab.data(5, policy=True), infinite), "importance_sampling"),
        lab.request(model_id, lab.data(6), FAILING_LOSS),
        lab.request(model_id, lab.data(6), "no_such_loss"),
    ]
    codes = [error_of(result).code for result in lab.run(*failing)]
    assert codes == ["NonFiniteError", "RuntimeError", "UnknownLossError"]
    assert_identical(lab.state(model_id), before)
    good = lab.request(model_id, lab.data(2))
    results = lab.run(*failing, good)
    assert [result.error is None for result in results] == [False, False, False, True]
    together = lab.gradient(model_id)
    copy = lab.snapshot(model_id)
    model_id = lab.anew(model_id)
    lab.restore(model_id, copy)
    for seed in (1, 2):
        lab.run_one(lab.request(model_id, lab.data(seed)))
    assert_identical(lab.gradient(model_id), together)


def test_forward_reports_the_same_and_leaves_everything_alone(lab: FullLab) -> None:
    model_id = lab.new()
    lab.train(model_id, 0)
    before = lab.state(model_id)
    forward = lab.run_one(lab.request(model_id, lab.data(1), forward_only=True))
    assert_identical(lab.state(model_id), before)
    assert_same_output(forward, lab.run_one(lab.request(model_id, lab.data(1))), 1e-6)


def test_a_step_without_gradient_succeeds(lab: FullLab) -> None:
    model_id = lab.new()
    before = lab.weights(model_id)
    assert lab.step(model_id, learning_rate=0.1)["grad_norm"] == 0.0
    assert_identical(lab.weights(model_id), before)


# --- one tenant -------------------------------------------------------------------------------------------------------


def test_one_model_at_a_time_and_no_adapters(lab: FullLab) -> None:
    assert lab.capabilities.full_parameter
    assert (lab.capabilities.max_models, lab.capabilities.max_lora_rank) == (1, 0)
    with pytest.raises(InvalidLoraConfigError, match=r"must be 0, got 4.*--full-parameter"):
        lab.create(rank=4)
    model_id = lab.new()
    with pytest.raises(CapacityError, match=r"all parameters of one model at a time.*unload"):
        lab.new()
    lab.anew(model_id)


def test_the_next_tenant_begins_with_the_base_model_bit_for_bit(lab: FullLab, base: Path) -> None:
    model_id = lab.new()
    original = lab.run_one(lab.request(model_id, lab.data(1), forward_only=True))
    lab.train(model_id, 0, 1, learning_rate=0.1)
    model_id = lab.anew(model_id)
    assert_identical(lab.weights(model_id), read_safetensors(base / "model.safetensors"))
    output = lab.run_one(lab.request(model_id, lab.data(1), forward_only=True))
    assert_same_output(output, original, 0.0)
    assert lab.gradient(model_id) == {}


# --- state ------------------------------------------------------------------------------------------------------------


def test_a_restored_model_continues_bit_for_bit(lab: FullLab) -> None:
    model_id = lab.new()
    lab.train(model_id, 0, 1)
    lab.run_one(lab.request(model_id, lab.data(2)))
    saved = lab.snapshot(model_id, gradient=True)
    lab.step(model_id, learning_rate=0.01)
    lab.train(model_id, 3)
    expected = lab.state(model_id)
    model_id = lab.anew(model_id)
    lab.restore(model_id, saved, gradient=True)
    lab.step(model_id, learning_rate=0.01)
    lab.train(model_id, 3)
    assert_identical(lab.state(model_id), expected)


def test_a_snapshot_holds_the_state_of_its_moment_however_late_it_is_written(lab: FullLab) -> None:
    model_id = lab.new()
    lab.train(model_id, 0)
    lab.run_one(lab.request(model_id, lab.data(1)))
    expected = lab.state(model_id)
    with lab.held_writes(model_id):
        directory, written = lab.begin_snapshot(model_id)
        lab.train(model_id, 2)
        lab.unload(model_id)
    written.result(timeout=120)
    assert_identical(read_state(directory), expected)


def test_checkpoints_move_between_worlds_bit_for_bit(
    one_rank: BlockingGroup, two_ranks: BlockingGroup, tmp_path: Path
) -> None:
    alone, split = FullLab(one_rank, tmp_path), FullLab(two_ranks, tmp_path)
    first = split.new()
    split.train(first, 0, 1)
    split.run_one(split.request(first, split.data(2)))
    saved = split.snapshot(first, gradient=True)
    second = alone.new()
    alone.restore(second, saved, gradient=True)
    back = alone.snapshot(second, gradient=True)
    assert_identical(read_state(back), read_state(saved))
    alone.step(second, learning_rate=0.01)
    split.restore(first, back, gradient=True)
    split.step(first, learning_rate=0.01)
    assert_close(split.weights(first), alone.weights(second), 1e-6)
    alone.close()
    split.close()


def test_checkpoints_that_are_damaged_or_of_an_adapter_are_refused_and_change_nothing(lab: FullLab) -> None:
    model_id = lab.new()
    lab.train(model_id, 0)
    lab.run_one(lab.request(model_id, lab.data(1)))
    good, before = lab.snapshot(model_id, gradient=True), lab.state(model_id)
    spoilt = lab.new_directory()
    for name in (*(f"{part}.safetensors" for part in PARTS), "tinker.json"):
        whole = (good / name).read_bytes()
        for damaged in (None, b"", whole[: len(whole) // 2]):
            shutil.copytree(good, spoilt, dirs_exist_ok=True)
            (spoilt / name).unlink()
            if damaged is not None:
                (spoilt / name).write_bytes(damaged)
            with pytest.raises(TinkerError) as caught:
                lab.restore(model_id, spoilt, gradient=True)
            assert not isinstance(caught.value, WorkerLostError), name
    manifest = json.loads((good / "tinker.json").read_text())
    manifest["lora_config"]["rank"] = 4
    (spoilt / "tinker.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointMismatchError, match=r"adapter of rank 4.*all parameters"):
        lab.restore(model_id, spoilt)
    assert_identical(lab.state(model_id), before)


@pytest.mark.parametrize("method", ["snapshot", "export"])
def test_a_write_that_fails_is_the_error_of_its_command_and_training_goes_on(lab: FullLab, method: str) -> None:
    model_id = lab.new()
    lab.train(model_id, 0)
    before = lab.state(model_id)
    missing = str(lab.new_directory() / "missing")
    with pytest.raises(StorageError, match="missing"):
        lab.group.call(method, StateCall(model_id=model_id, directory=missing))
    assert_identical(lab.state(model_id), before)
    lab.train(model_id, 1)


# --- samplers ---------------------------------------------------------------------------------------------------------


def test_weights_for_samplers_are_a_model_that_transformers_loads(lab: FullLab, base: Path) -> None:
    from transformers import AutoTokenizer

    model_id = lab.new()
    lab.train(model_id, 0, 1)
    exported = lab.export(model_id)
    assert not (exported / "adapter_config.json").exists()
    assert json.loads((exported / "tinker.json").read_text())["lora_config"]["rank"] == 0
    data = lab.data(2)
    output = output_of(lab.run(lab.request(model_id, data, forward_only=True))[0])
    reference = Reference(exported)
    for found, datum in zip(logprobs_of(output), data, strict=True):
        np.testing.assert_allclose(found, reference.logprobs(datum).detach().numpy(), atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.encode("ab") == AutoTokenizer.from_pretrained(base).encode("ab")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
