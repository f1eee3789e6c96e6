"""The chunked head beside plain autograd, over a random projection."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest
import torch
from torch.nn import functional

from tinker_core.interfaces import LossPlugin
from tinker_core.training.adapters import AdapterGradient, AdapterLayout, AdapterWeights, LinearSpec, Segment
from tinker_core.training.logprobs import HeadDatum, HeadResult, LossHead
from tinker_core.training.lora import add_lora
from tinker_core.training.losses import BUILT_IN_LOSSES
from tinker_core.training.vocabulary import WholeVocabulary
from tinker_core.types import LoraConfig

LOSSES = {loss.name: loss for loss in BUILT_IN_LOSSES}
HIDDEN, VOCAB, LENGTH = 6, 13, 12
NAME = "lm_head"


class Projection:
    """Counts the rows of logits that are asked for."""

    name = NAME
    weight_gradient = None
    vocabulary = WholeVocabulary(VOCAB)

    def __init__(self) -> None:
        self.weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
        self.rows: list[int] = []

    def partial_logits(self, hidden: torch.Tensor, segments: tuple[Segment, ...]) -> torch.Tensor:
        self.rows.append(hidden.shape[0])
        logits = functional.linear(hidden, self.weight)
        add_lora(logits, hidden, NAME, segments)
        return logits


def random_inputs(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "target_tokens": torch.randint(VOCAB, (count,), generator=generator),
        "weights": torch.randn(count, generator=generator),
        "logprobs": -2 + torch.randn(count, generator=generator),
        "advantages": torch.randn(count, generator=generator),
        "sequence_ratio_mask": torch.ones(count),
        "sampled": (torch.arange(count) % 3 > 0).float(),
    }


def head_data(name: str, splits: tuple[int, ...], *, needs_gradient: bool = True) -> list[HeadDatum]:
    """Data of the given lengths, one after the other; whole-datum losses see each alone."""
    inputs = random_inputs(LENGTH)
    data, start = [], 0
    for owner, length in enumerate(splits):
        end = start + length
        data.append(
            HeadDatum(
                owner=owner,
                positions=torch.arange(start, end),
                inputs={key: value[start:end] for key, value in inputs.items()},
                loss=LOSSES[name],
                config={"clip_low_threshold": 0.5, "clip_high_threshold": 1.5, "beta": 0.1, "kl_coeff": 0.3},
                needs_gradient=needs_gradient,
            )
        )
        start = end
    return data


def adapter(seed: int, rank: int) -> tuple[AdapterWeights, AdapterGradient]:
    spec = LinearSpec(name=NAME, in_features=HIDDEN, out_features=VOCAB)
    layout = AdapterLayout((spec,), LoraConfig(rank=rank, seed=seed))
    row = 0.2 * torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    return AdapterWeights(layout, row), AdapterGradient(layout, torch.zeros(layout.size))


def reference(data: list[HeadDatum], hidden: torch.Tensor, segments: tuple[Segment, ...], projection: Projection):
    """Losses, and gradients of hidden states and adapter rows, by autograd over full logits."""
    hidden = hidden.clone().requires_grad_()
    rows = [segment.weights.row.clone().requires_grad_() for segment in segments]
    logits = functional.linear(hidden, projection.weight)
    parts = []
    for segment, row in zip(segments, rows, strict=True):
        a, b = segment.weights.layout.views(row)[NAME]
        part = slice(segment.start, segment.end)
        parts.append(logits[part] + segment.weights.scale * (hidden[part] @ a.t()) @ b.t())
    table = torch.log_softmax(torch.cat(parts), -1)
    losses = []
    for datum in data:
        logprobs = table[datum.positions, datum.inputs["target_tokens"]]
        losses.append(datum.loss.compute(logprobs, Context(datum)))
    sum(losses).backward()
    return [loss.item() for loss in losses], hidden.grad, [row.grad for row in rows]


class Context:
    def __init__(self, datum: HeadDatum) -> None:
        self.config = datum.config
        self.input: Callable[[str], torch.Tensor] = lambda name: datum.inputs[name]

    def has_input(self, name: str) -> bool:
        return name in ("weights", "sampled")


def run(data: list[HeadDatum], segments: tuple[Segment, ...], hidden: torch.Tensor, chunk: int | None):
    projection = Projection()
    head = LossHead(data, segments, num_owners=len(data), chunk_rows=chunk)
    _, result = head(hidden, projection)
    return projection, result


@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_equal_autograd_for_every_loss_and_chunk(name: str, chunk: int | None) -> None:
    hidden = torch.randn(LENGTH, HIDDEN, generator=torch.Generator().manual_seed(3))
    (first, first_grad), (second, second_grad) = adapter(1, 2), adapter(2, 3)
    segments = (Segment(0, 7, first, first_grad), Segment(7, LENGTH, second, second_grad))
    data = head_data(name, (4, 3, 5))
    projection, result = run(data, segments, hidden, chunk)
    losses, grad_hidden, grad_rows = reference(data, hidden, segments, projection)
    assert result.losses.tolist() == pytest.approx(losses, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(result.grad_hidden, grad_hidden, rtol=1e-4, atol=1e-5)
    for found, expected in zip((first_grad, second_grad), grad_rows, strict=True):
        torch.testing.assert_close(found.row, expected, rtol=1e-4, atol=1e-5)
    if chunk is not None:
        assert max(projection.rows) <= chunk


def test_logits_of_per_token_losses_are_computed_once() -> None:
    hidden = torch.randn(LENGTH, HIDDEN)
    for name, times in (("cross_entropy", 1), ("ppo", 1), ("gspo", 2)):
        projection, _ = run(head_data(name, (LENGTH,)), (), hidden, 4)
        assert sum(projection.rows) == times * LENGTH


def test_a_loss_of_whole_data_may_share_the_logits_of_their_chunk() -> None:
    hidden = torch.randn(LENGTH, HIDDEN, generator=torch.Generator().manual_seed(3))
    apart = head_data("gspo", (4, 3, 5))
    sharing = [attrs.evolve(datum, loss=attrs.evolve(datum.loss, reuses_logits=True)) for datum in apart]
    _, expected = run(apart, (), hidden, 5)
    projection, found = run(sharing, (), hidden, 5)
    # Chunks are rows 0-4, 5-9 and 10-11: the first datum lies in one of them, the others do not.
    assert sum(projection.rows) == 2 * LENGTH - 4
    assert found.losses.tolist() == pytest.approx(expected.losses.tolist())
    torch.testing.assert_close(found.grad_hidden, expected.grad_hidden)


def test_metrics_are_reported_per_datum_and_only_by_name() -> None:
    def compute(logprobs, context):
        context.report("seen:sum", logprobs.numel())
        context.report("total:mean", logprobs.sum())
        return -logprobs.sum()

    loss = LossPlugin(name="telling", compute=compute, metrics=("seen:sum", "total:mean"))
    data = [attrs.evolve(datum, loss=loss) for datum in head_data("ppo", (4, 8))]
    _, result = run(data, (), torch.randn(LENGTH, HIDDEN), 5)
    assert [owner for owner, _ in result.reports] == [0, 1]
    assert [float(reports["seen:sum"]) for _, reports in result.reports] == [4.0, 8.0]
    assert sum(float(reports["total:mean"]) for _, reports in result.reports) == pytest.approx(
        -result.losses.sum().item()
    )
    silent = [attrs.evolve(datum, loss=attrs.evolve(loss, metrics=())) for datum in data]
    _, result = run(silent, (), torch.randn(LENGTH, HIDDEN), 5)
    assert isinstance(result.failure, ValueError)


def test_forward_only_data_get_no_gradient() -> None:
    _, result = run(head_data("ppo", (4, 8), needs_gradient=False), (), torch.randn(LENGTH, HIDDEN), 5)
    assert result.grad_hidden is None
    assert torch.isfinite(result.losses).all()


def failing(result: HeadResult) -> str:
    assert result.failure is not None
    return str(result.failure)


def test_an_exception_of_loss_code_is_reported_and_the_head_still_ends() -> None:
    data = head_data("gspo", (4, 8))
    data[1].inputs["sequence_ratio_mask"].zero_()
    _, result = run(data, (), torch.randn(LENGTH, HIDDEN), 5)
    assert "sequence_ratio_mask is 0 everywhere" in failing(result)
    assert len(result.logprobs) == 2
