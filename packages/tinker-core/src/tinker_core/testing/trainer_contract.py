"""What every trainer must do, as a suite of tests.

Subclass `TrainerContract` in a test module that has a fixture ``group``: a `BlockingGroup` of the trainer under test,
best of module scope, with at least four model slots, `tinker_core.testing.faults` among its plugins, and the
losses cross_entropy and importance_sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from tinker_core.errors import CapacityError, CheckpointMismatchError, InvalidLoraConfigError, UnknownModelError
from tinker_core.testing.custom_loss_contract import CustomLossContract
from tinker_core.testing.faults import FAILING_LOSS
from tinker_core.testing.group import BlockingGroup
from tinker_core.testing.snapshot_contract import SnapshotContract
from tinker_core.testing.trainer_lab import (
    Arrays,
    TrainerLab,
    assert_close,
    assert_identical,
    assert_same_output,
    error_of,
    logprobs_of,
    make_datum,
    output_of,
    read_safetensors,
)
from tinker_core.types import AdamParams, Datum, ImageChunk, ModelInput, PreparedModelPass, PreparedOptimStep

Spoil = Callable[[TrainerLab, PreparedModelPass], PreparedModelPass]
"""Makes a good request bad."""


def _with_data(*data: Datum) -> Spoil:
    return lambda lab, request: attrs.evolve(request, data=data)


def _with_token(name: str, value: Callable[[TrainerLab], int]) -> Spoil:
    def spoil(lab: TrainerLab, request: PreparedModelPass) -> PreparedModelPass:
        tokens, targets = np.array([1, 2, 3]), np.array([2, 3, 4])
        (tokens if name == "model_input" else targets)[1] = value(lab)
        return attrs.evolve(request, data=(*request.data, make_datum(tokens, targets)))

    return spoil


def _policy(**inputs: list[float]) -> Spoil:
    datum = make_datum([1, 2], [2, 3], **{"logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0], **inputs})
    return lambda lab, request: attrs.evolve(request, data=(datum,), loss_fn="importance_sampling")


def _too_long(lab: TrainerLab, request: PreparedModelPass) -> PreparedModelPass:
    tokens = np.ones(lab.capabilities.max_context_length + 1, np.int32)
    return attrs.evolve(request, data=(make_datum(tokens, tokens),))


_IMAGE = attrs.evolve(
    make_datum([1], [1]), model_input=ModelInput(chunks=(ImageChunk(data=b"no image", format="png"),))
)

BAD_REQUESTS: dict[str, tuple[Spoil, str]] = {
    "input id outside the vocabulary": (_with_token("model_input", lambda lab: lab.capabilities.vocab_size), "model_i"),
    "negative input id": (_with_token("model_input", lambda lab: -1), "model_input"),
    "target id outside the vocabulary": (_with_token("target", lambda lab: lab.capabilities.vocab_size), "target_tok"),
    "negative target id": (_with_token("target", lambda lab: -7), "target_tokens"),
    "targets of another length": (_with_data(make_datum([1, 2, 3], [1, 2])), "target_tokens"),
    "weights of another length": (_with_data(make_datum([1, 2], [1, 2], weights=[1.0])), "weights"),
    "weights that are not numbers": (_with_data(make_datum([1, 2], [1, 2], weights=[1.0, np.nan])), "weights"),
    "infinite weights": (_with_data(make_datum([1, 2], [1, 2], weights=[1.0, np.inf])), "weights"),
    "infinite advantages": (_policy(advantages=[1.0, -np.inf]), "advantages"),
    "sampler logprobs that are not numbers": (_policy(logprobs=[np.nan, -1.0]), "logprobs"),
    "targets that are not integers": (_with_data(make_datum([1, 2], [1.0, 2.0])), "target_tokens"),
    "no data": (_with_data(), "data"),
    "no tokens": (_with_data(make_datum([], np.zeros(0, np.int64))), "model_input"),
    "longer than the context": (_too_long, "context"),
    "an image": (_with_data(_IMAGE), "ImageChunk"),
    "a missing input": (
        lambda lab, request: attrs.evolve(request, data=(make_datum([1], [1]),), loss_fn="importance_sampling"),
        "logprobs",
    ),
    "an unknown input": (_with_data(make_datum([1], [1], surprise=[1.0])), "surprise"),
    "an unknown loss": (lambda lab, request: attrs.evolve(request, loss_fn="no_such_loss"), "no_such_loss"),
    "a custom loss without its graph": (lambda lab, request: attrs.evolve(request, loss_fn="custom"), "custom"),
    "an unknown loss setting": (
        lambda lab, request: attrs.evolve(request, loss_fn_config={"temperature": 1.0}),
        "temperature",
    ),
}
"""Requests that cannot run, with a part of the message that tells why."""


def reference_adamw(start: Arrays, gradients: list[Arrays], params: list[AdamParams]) -> Arrays:
    """AdamW after some steps from fresh moments, in float64."""
    weights = {name: array.astype(np.float64) for name, array in start.items()}
    first = {name: np.zeros_like(array) for name, array in weights.items()}
    second = {name: np.zeros_like(array) for name, array in weights.items()}
    for count, (gradient, step) in enumerate(zip(gradients, params, strict=True), start=1):
        norm = np.sqrt(sum(float(np.square(array.astype(np.float64)).sum()) for array in gradient.values()))
        clip = min(1.0, step.grad_clip_norm / norm) if step.grad_clip_norm > 0 else 1.0
        for name, array in weights.items():
            grad = gradient[name].astype(np.float64) * clip
            first[name] = step.beta1 * first[name] + (1 - step.beta1) * grad
            second[name] = step.beta2 * second[name] + (1 - step.beta2) * grad**2
            mean = first[name] / (1 - step.beta1**count)
            spread = np.sqrt(second[name] / (1 - step.beta2**count)) + step.eps
            array *= 1 - step.learning_rate * step.weight_decay
            array -= step.learning_rate * mean / spread
    return weights


class TrainerContract(CustomLossContract, SnapshotContract):
    """Run by subclassing; see the module."""

    tolerance = 1e-6
    """Relative difference that packing may make; raise it for low precision."""

    # --- what a subclass may replace ----------------------------------------------------------------------------------

    def read_gradient(self, directory: Path) -> Arrays:
        """The accumulated gradient in a snapshot, empty if there is none; names equal to those of the weights."""
        return read_safetensors(directory / "gradient.safetensors")

    def read_weights(self, directory: Path) -> Arrays:
        """The weights in a snapshot or an export."""
        return read_safetensors(directory / "adapter_model.safetensors", "base_model.model.")

    # --- fixtures -----------------------------------------------------------------------------------------------------

    @pytest.fixture
    def lab(self, group: BlockingGroup, tmp_path: Path) -> Iterator[TrainerLab]:
        """Models that are forgotten after the test."""
        lab = TrainerLab(group, tmp_path)
        yield lab
        lab.close()

    def gradient(self, lab: TrainerLab, model_id: str) -> Arrays:
        """What a model has accumulated; empty if nothing."""
        return self.read_gradient(lab.snapshot(model_id, gradient=True))

    def weights(self, lab: TrainerLab, model_id: str) -> Arrays:
        """A model's weights."""
        return self.read_weights(lab.export(model_id))

    # --- models -------------------------------------------------------------------------------------------------------

    def test_a_new_model_is_the_base_model_with_weights_from_its_seed(self, lab: TrainerLab) -> None:
        one, same, other = lab.create(seed=5), lab.create(seed=5), lab.create(seed=6)
        assert_identical(self.weights(lab, one), self.weights(lab, same))
        different = self.weights(lab, other)
        assert any(np.any(array != different[name]) for name, array in self.weights(lab, one).items())
        first, second = (lab.run_one(lab.request(name, lab.data(0), forward_only=True)) for name in (one, other))
        assert_same_output(first, second, self.tolerance)

    @pytest.mark.parametrize(
        "settings",
        [
            {"rank": 0},
            {"rank": -3},
            {"rank": 10**6},
            {"train_attn": False, "train_mlp": False, "train_unembed": False},
        ],
    )
    def test_a_lora_configuration_that_cannot_be_built_is_refused(
        self, lab: TrainerLab, settings: dict[str, Any]
    ) -> None:
        with pytest.raises(InvalidLoraConfigError):
            lab.create(**settings)

    def test_models_beyond_the_capacity_are_refused_until_one_is_unloaded(self, lab: TrainerLab) -> None:
        models = [lab.create(rank=1) for _ in range(lab.capabilities.max_models)]
        with pytest.raises(CapacityError):
            lab.create(rank=1)
        lab.unload(models[0])
        lab.create(rank=1)

    def test_an_unloaded_model_is_unknown(self, lab: TrainerLab) -> None:
        gone, healthy = lab.create(), lab.create()
        lab.unload(gone)
        passed, other = lab.run(lab.request(gone, lab.data(0)), lab.request(healthy, lab.data(1)))
        assert (error_of(passed).category, error_of(passed).code) == ("user", "UnknownModelError")
        output_of(other)
        stepped, other_step = lab.steps(gone, healthy)
        assert error_of(stepped).code == "UnknownModelError"
        assert other_step.error is None
        with pytest.raises(UnknownModelError):
            lab.snapshot(gone)

    # --- passes -------------------------------------------------------------------------------------------------------

    def test_gradients_of_several_passes_add_up(self, lab: TrainerLab) -> None:
        apart, joined = lab.create(), lab.create()
        for model_id in (apart, joined):
            lab.train(model_id, 0)
        data = lab.data(1)
        lab.run_one(lab.request(apart, data[:2]))
        lab.run_one(lab.request(apart, data[2:]))
        lab.run_one(lab.request(joined, data))
        assert_close(self.gradient(lab, apart), self.gradient(lab, joined), self.tolerance)

    def test_doubling_the_weights_doubles_loss_and_gradient(self, lab: TrainerLab) -> None:
        once, twice = lab.create(), lab.create()
        for model_id in (once, twice):
            lab.train(model_id, 0)
        data = lab.data(1)
        doubled = [
            attrs.evolve(
                datum,
                loss_fn_inputs={
                    **datum.loss_fn_inputs,
                    "weights": datum.loss_fn_inputs["weights"].with_data(2 * datum.loss_fn_inputs["weights"].data),
                },
            )
            for datum in data
        ]
        single = lab.run_one(lab.request(once, data)).metrics["loss:sum"]
        assert lab.run_one(lab.request(twice, doubled)).metrics["loss:sum"] == pytest.approx(2 * single, rel=1e-5)
        expected = {name: 2 * array for name, array in self.gradient(lab, once).items()}
        assert_close(self.gradient(lab, twice), expected, self.tolerance)

    def test_models_in_one_pass_get_what_they_get_alone(self, lab: TrainerLab) -> None:
        together = [lab.create(rank=rank, seed=rank) for rank in (2, 4)]
        alone = [lab.create(rank=rank, seed=rank) for rank in (2, 4)]
        for model_id in (*together, *alone):
            lab.train(model_id, 0)
        data = [(lab.data(1), "cross_entropy"), (lab.data(2, policy=True), "importance_sampling")]
        joint = lab.run(*(lab.request(name, *share) for name, share in zip(together, data, strict=True)))
        for name, lone, share, result in zip(together, alone, data, joint, strict=True):
            assert_same_output(output_of(result), lab.run_one(lab.request(lone, *share)), self.tolerance)
            assert_close(self.gradient(lab, name), self.gradient(lab, lone), self.tolerance)

    def test_a_pass_is_the_same_whatever_it_is_packed_with(self, lab: TrainerLab) -> None:
        models = [lab.create(rank=rank, seed=rank) for rank in (4, 1, 8, 2)]
        for model_id in models:
            lab.train(model_id, 0)
        target, *tenants = models
        saved, data = lab.snapshot(target), (lab.data(1), lab.data(2, (3, 30, 2)), lab.data(3, (1,)))
        requests = [lab.request(name, share) for name, share in zip(tenants, data, strict=True)]
        requests[1] = attrs.evolve(requests[1], forward_only=True)
        own = lab.request(target, lab.data(4, (7, 2, 13)))
        expected = lab.run_one(own)
        gradient = self.gradient(lab, target)
        for before in range(4):
            lab.restore(target, saved)
            packed = lab.run(*requests[:before], own, *requests[before:])
            assert_same_output(output_of(packed[before]), expected, max(self.tolerance, 1e-5))
            assert_close(self.gradient(lab, target), gradient, max(self.tolerance, 1e-5))

    def test_forward_reports_the_same_and_leaves_the_gradient_alone(self, lab: TrainerLab) -> None:
        model_id = lab.create()
        lab.train(model_id, 0)
        data = lab.data(1)
        forward = lab.run_one(lab.request(model_id, data, forward_only=True))
        assert self.gradient(lab, model_id) == {}
        both = lab.run_one(lab.request(model_id, data))
        assert_same_output(forward, both, self.tolerance)
        before = self.gradient(lab, model_id)
        lab.run_one(lab.request(model_id, lab.data(2), forward_only=True))
        assert_identical(self.gradient(lab, model_id), before)

    def test_outputs_have_the_shape_of_their_targets_and_the_loss_is_a_sum(self, lab: TrainerLab) -> None:
        model_id = lab.create()
        data = lab.data(3)
        output = lab.run_one(lab.request(model_id, data))
        assert list(output.metrics) == ["loss:sum"]
        total = 0.0
        for datum, logprobs in zip(data, logprobs_of(output), strict=True):
            assert logprobs.dtype == np.float32
            assert logprobs.shape == datum.loss_fn_inputs["target_tokens"].shape
            total -= float((logprobs * datum.loss_fn_inputs["weights"].to_numpy()).sum())
        assert output.metrics["loss:sum"] == pytest.approx(total, rel=1e-4, abs=1e-4)

    # --- failures -----------------------------------------------------------------------------------------------------

    def check_only_one_fails(self, lab: TrainerLab, spoil: Callable[[str], PreparedModelPass]) -> str:
        """A bad request beside a good one: the bad one changes nothing, the good one is as if alone; returns why."""
        guilty, healthy, alone = lab.create(seed=1), lab.create(seed=2), lab.create(seed=2)
        for model_id in (guilty, healthy, alone):
            lab.train(model_id, 0)
            lab.run_one(lab.request(model_id, lab.data(1)))
        before = self.gradient(lab, guilty), self.weights(lab, guilty)
        data = lab.data(2)
        failed, passed = lab.run(spoil(guilty), lab.request(healthy, data))
        assert_identical(self.gradient(lab, guilty), before[0])
        assert_identical(self.weights(lab, guilty), before[1])
        assert_same_output(output_of(passed), lab.run_one(lab.request(alone, data)), self.tolerance)
        assert_close(self.gradient(lab, healthy), self.gradient(lab, alone), self.tolerance)
        error = error_of(failed)
        assert error.category == "user" or error.code == "RuntimeError"
        return f"{error.code}: {error.message}"

    def test_a_loss_that_is_not_finite_fails_its_own_request_only(self, lab: TrainerLab) -> None:
        (datum,) = lab.data(4, (6,), policy=True)
        extreme = datum.loss_fn_inputs["logprobs"].with_data(np.full(6, -1e4, np.float32))
        bad = attrs.evolve(datum, loss_fn_inputs={**datum.loss_fn_inputs, "logprobs": extreme})
        reason = self.check_only_one_fails(
            lab, lambda name: lab.request(name, (*lab.data(5, policy=True), bad), "importance_sampling")
        )
        assert reason.startswith("NonFiniteError")

    def test_a_gradient_that_is_not_finite_fails_its_own_request_only(self, lab: TrainerLab) -> None:
        (datum,) = lab.data(4, (6,))
        # Finite weights whose losses cancel and whose gradients overflow.
        huge = datum.loss_fn_inputs["weights"].with_data(np.array([3e38, -3e38] * 3, np.float32))
        bad = attrs.evolve(datum, loss_fn_inputs={**datum.loss_fn_inputs, "weights": huge})
        reason = self.check_only_one_fails(lab, lambda name: lab.request(name, (bad,)))
        assert reason.startswith("NonFiniteError")

    def test_a_loss_that_raises_in_backward_fails_its_own_request_only(self, lab: TrainerLab) -> None:
        reason = self.check_only_one_fails(lab, lambda name: lab.request(name, lab.data(6), FAILING_LOSS))
        assert "this loss fails in backward" in reason

    @pytest.mark.parametrize("what", BAD_REQUESTS)
    def test_a_bad_request_is_a_user_error_and_its_neighbour_stays_healthy(self, lab: TrainerLab, what: str) -> None:
        spoil, expected = BAD_REQUESTS[what]
        guilty, healthy = lab.create(), lab.create()
        bad = spoil(lab, lab.request(guilty, lab.data(1)))
        failed, passed = lab.run(bad, lab.request(healthy, lab.data(2)))
        assert error_of(failed).category == "user"
        assert expected in error_of(failed).message
        output_of(passed)
        assert self.gradient(lab, guilty) == {}

    # --- optimizer ----------------------------------------------------------------------------------------------------

    def test_steps_equal_adamw_with_the_parameters_of_each_step(self, lab: TrainerLab) -> None:
        model_id = lab.create()
        start = self.weights(lab, model_id)
        gradients, params = [], []
        for index in range(4):
            lab.run_one(lab.request(model_id, lab.data(index)))
            gradients.append(self.gradient(lab, model_id))
            params.append(
                AdamParams(
                    learning_rate=0.01 / (1 + index),
                    beta1=0.8 + 0.02 * index,
                    beta2=0.9 + 0.01 * index,
                    eps=1e-6 * (1 + index),
                    weight_decay=0.1 * index,
                    grad_clip_norm=(0.0, 0.1, 1e6, 0.3)[index],
                )
            )
            metrics = lab.step(model_id, **attrs.asdict(params[-1]))
            norm = np.sqrt(sum(float(np.square(array).sum()) for array in gradients[-1].values()))
            assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
            assert self.gradient(lab, model_id) == {}
        assert_close(self.weights(lab, model_id), reference_adamw(start, gradients, params), 1e-4)

    def test_a_step_without_gradient_succeeds(self, lab: TrainerLab) -> None:
        model_id = lab.create()
        before = self.weights(lab, model_id)
        assert lab.step(model_id, learning_rate=0.1)["grad_norm"] == 0.0
        assert_identical(self.weights(lab, model_id), before)

    def test_a_step_of_one_model_leaves_the_others_alone(self, lab: TrainerLab) -> None:
        stepped, still = lab.create(), lab.create()
        for model_id in (stepped, still):
            lab.run_one(lab.request(model_id, lab.data(0)))
        weights, gradient = self.weights(lab, still), self.gradient(lab, still)
        lab.step(stepped, learning_rate=0.1)
        assert_identical(self.weights(lab, still), weights)
        assert_identical(self.gradient(lab, still), gradient)

    def test_parameters_of_another_optimizer_are_refused_and_change_nothing(self, lab: TrainerLab) -> None:
        model_id = lab.create()
        lab.run_one(lab.request(model_id, lab.data(0)))
        before = self.weights(lab, model_id), self.gradient(lab, model_id)
        step = PreparedOptimStep(request_id="s", model_id=model_id, optimizer_params={"type": "other"})
        (result,) = lab.group.call("optim_step", (step,))
        assert error_of(result).category == "user"
        assert_identical(self.weights(lab, model_id), before[0])
        assert_identical(self.gradient(lab, model_id), before[1])

    # --- state --------------------------------------------------------------------------------------------------------

    def test_a_restored_model_continues_bit_for_bit(self, lab: TrainerLab) -> None:
        original, copy = lab.create(seed=1), lab.create(seed=2)
        lab.train(original, 0, 1)
        lab.restore(copy, lab.snapshot(original))
        for model_id in (original, copy):
            lab.train(model_id, 2, 3)
        assert_identical(self.weights(lab, copy), self.weights(lab, original))

    def test_without_the_optimizer_moments_start_fresh(self, lab: TrainerLab) -> None:
        original, copy = lab.create(seed=1), lab.create(seed=2)
        lab.train(original, 0, 1)
        start = self.weights(lab, original)
        lab.train(copy, 7)  # moments that must not survive
        lab.restore(copy, lab.snapshot(original), optimizer=False)
        assert_identical(self.weights(lab, copy), start)
        lab.run_one(lab.request(copy, lab.data(2)))
        gradient = self.gradient(lab, copy)
        params = AdamParams(learning_rate=0.01, eps=1e-6)
        lab.step(copy, **attrs.asdict(params))
        assert_close(self.weights(lab, copy), reference_adamw(start, [gradient], [params]), 1e-5)

    def test_a_gradient_in_progress_is_kept_when_asked_for_and_cleared_otherwise(self, lab: TrainerLab) -> None:
        original, copy, cleared = lab.create(seed=1), lab.create(seed=2), lab.create(seed=3)
        lab.train(original, 0)
        for model_id in (original, cleared):
            lab.run_one(lab.request(model_id, lab.data(1)))
        saved = lab.snapshot(original, gradient=True)
        lab.restore(copy, saved, gradient=True)
        lab.restore(cleared, saved)
        assert self.gradient(lab, cleared) == {}
        for model_id in (original, copy):
            lab.step(model_id, learning_rate=0.01)
        assert_identical(self.weights(lab, copy), self.weights(lab, original))

    def test_a_checkpoint_of_another_rank_is_refused_and_changes_nothing(self, lab: TrainerLab) -> None:
        small, large = lab.create(rank=2), lab.create(rank=4)
        before = self.weights(lab, large)
        with pytest.raises(CheckpointMismatchError):
            lab.restore(large, lab.snapshot(small))
        assert_identical(self.weights(lab, large), before)

    def test_an_export_holds_the_weights_of_the_moment(self, lab: TrainerLab) -> None:
        model_id = lab.create()
        lab.train(model_id, 0)
        exported = lab.export(model_id)
        saved = self.read_weights(lab.snapshot(model_id))
        lab.train(model_id, 1)
        assert_identical(self.read_weights(exported), saved)
