"""What a trainer must do with custom losses: run them as the client's own two passes would, or refuse them by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import numpy as np
import pytest

from tinker_core.testing.graph_builder import GraphBuilder, clipped_policy_loss, clipped_policy_reference
from tinker_core.testing.trainer_lab import (
    Arrays,
    TrainerLab,
    assert_close,
    error_of,
    logprobs_of,
    make_datum,
    output_of,
)
from tinker_core.types import CUSTOM_LOSS, CustomLoss, CustomLossOp, Datum, PreparedModelPass


class _Contract(Protocol):
    tolerance: float

    def gradient(self, lab: TrainerLab, model_id: str) -> Arrays: ...

    def check_only_one_fails(self, lab: TrainerLab, spoil: Callable[[str], PreparedModelPass]) -> str: ...


def policy_data(lab: TrainerLab, seed: int) -> tuple[Datum, ...]:
    """Data with the inputs of `clipped_policy_loss`, and one that it does not read."""
    data = []
    for datum in lab.data(seed, policy=True):
        inputs = datum.loss_fn_inputs
        others = {"old": inputs["logprobs"], "advantages": inputs["advantages"], "unused": inputs["logprobs"]}
        data.append(attrs.evolve(datum, loss_fn_inputs={"target_tokens": inputs["target_tokens"], **others}))
    return tuple(data)


def custom_request(lab: TrainerLab, model_id: str, data: Sequence[Datum], loss: CustomLoss) -> PreparedModelPass:
    """A pass with a custom loss."""
    return lab.request(model_id, data, CUSTOM_LOSS, loss_fn_config={"loss_id": "loss"}, custom_loss=loss)


def _unknown_operation() -> CustomLoss:
    graph = GraphBuilder(logprobs=1)
    return graph.returns(graph.call("os.system", graph["logprobs"]))


def _of_a_module() -> CustomLoss:
    graph = GraphBuilder(logprobs=1)
    return graph.returns(graph.add(CustomLossOp.CALL_MODULE, "linear", (graph["logprobs"],), {}))


def _mismatched() -> CustomLoss:
    graph = GraphBuilder(logprobs=1)
    longer = graph.call("torch.cat", [graph["logprobs"], graph["logprobs"], graph["logprobs"]])
    return graph.returns(graph.method("sum", graph.call("operator.mul", longer, graph.method("tile", longer, 2))))


def _not_scalar() -> CustomLoss:
    graph = GraphBuilder(logprobs=1)
    return graph.returns(graph.method("unsqueeze", graph.method("sum", graph["logprobs"]), 0))


def _without_gradient() -> CustomLoss:
    graph = GraphBuilder(logprobs=1)
    return graph.returns(graph.method("sum", graph.method("detach", graph["logprobs"])))


def _enormous() -> CustomLoss:
    graph = GraphBuilder(logprobs=1)
    made = graph.call("torch.zeros", 10**12)
    return graph.returns(graph.call("operator.add", graph.method("sum", made), graph.method("sum", graph["logprobs"])))


def _not_finite() -> CustomLoss:
    graph = GraphBuilder(logprobs=1)
    return graph.returns(graph.method("sum", graph.call("torch.log", graph["logprobs"])))


BAD_LOSSES: dict[str, tuple[Callable[[], CustomLoss], str]] = {
    "an operation that is not offered": (_unknown_operation, "node_1"),
    "a module": (_of_a_module, "node_1"),
    "shapes that do not fit": (_mismatched, "node_3"),
    "a loss that is no scalar": (_not_scalar, "scalar"),
    "a loss without gradient": (_without_gradient, "gradient"),
    "an enormous tensor": (_enormous, "node_1"),
    "a loss that is not finite": (_not_finite, "NonFiniteError"),
}
"""Losses that cannot run, with a part of the message that tells why."""


class CustomLossContract:
    """Part of `tinker_core.testing.trainer_contract.TrainerContract`."""

    def test_custom_losses_are_offered_or_refused_by_name(self: _Contract, lab: TrainerLab) -> None:
        model_id = lab.create()
        (result,) = lab.run(custom_request(lab, model_id, policy_data(lab, 1), clipped_policy_loss()))
        if CUSTOM_LOSS in lab.capabilities.losses:
            output_of(result)
        else:
            assert error_of(result).category == "user"
            assert "'custom'" in error_of(result).message

    def test_a_custom_loss_equals_the_passes_that_the_client_would_make(self: _Contract, lab: TrainerLab) -> None:
        _require_offered(lab)
        served, client, neighbour, alone = (
            lab.create(seed=1),
            lab.create(seed=1),
            lab.create(seed=2),
            lab.create(seed=2),
        )
        for model_id in (served, client, neighbour, alone):
            lab.train(model_id, 0)
        data = policy_data(lab, 1)
        found, _ = lab.run(
            custom_request(lab, served, data, clipped_policy_loss()), lab.request(neighbour, lab.data(2))
        )
        plain = [
            attrs.evolve(datum, loss_fn_inputs={"target_tokens": datum.loss_fn_inputs["target_tokens"]})
            for datum in data
        ]
        logprobs = logprobs_of(lab.run_one(lab.request(client, plain, forward_only=True)))
        total, sums, weighted = 0.0, {"custom/ratio:mean": 0.0, "custom/gain:sum": 0.0}, []
        for datum, values in zip(data, logprobs, strict=True):
            inputs = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()}
            value, slopes, metrics = clipped_policy_reference(values, inputs["old"], inputs["advantages"])
            total += value
            sums = {name: sums[name] + metrics[name] for name in sums}
            weighted.append(make_datum(datum.model_input.text_tokens(), inputs["target_tokens"], weights=-slopes))
        lab.run_one(lab.request(client, weighted))
        sums["custom/ratio:mean"] /= len(data)
        output = output_of(found)
        assert output.metrics == pytest.approx({"loss:sum": total, **sums}, rel=self.tolerance, abs=self.tolerance)
        for found_values, values in zip(logprobs_of(output), logprobs, strict=True):
            np.testing.assert_allclose(found_values, values, rtol=self.tolerance, atol=10 * self.tolerance)
        assert_close(self.gradient(lab, served), self.gradient(lab, client), self.tolerance)
        lab.run_one(lab.request(alone, lab.data(2)))
        assert_close(self.gradient(lab, neighbour), self.gradient(lab, alone), self.tolerance)

    def test_a_custom_loss_without_gradient_reports_the_same(self: _Contract, lab: TrainerLab) -> None:
        _require_offered(lab)
        model_id = lab.create()
        request = custom_request(lab, model_id, policy_data(lab, 1), clipped_policy_loss())
        forward = lab.run_one(attrs.evolve(request, forward_only=True))
        assert self.gradient(lab, model_id) == {}
        assert lab.run_one(request).metrics == pytest.approx(forward.metrics, rel=self.tolerance)

    @pytest.mark.parametrize("what", BAD_LOSSES)
    def test_a_bad_custom_loss_is_a_user_error_of_its_own_request_only(
        self: _Contract, lab: TrainerLab, what: str
    ) -> None:
        _require_offered(lab)
        make, expected = BAD_LOSSES[what]
        reason = self.check_only_one_fails(lab, lambda name: custom_request(lab, name, lab.data(3), make()))
        assert expected in reason


def _require_offered(lab: TrainerLab) -> None:
    if CUSTOM_LOSS not in lab.capabilities.losses:
        pytest.skip("this trainer refuses custom losses")
