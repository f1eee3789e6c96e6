"""Drawing against reference formulas: frequencies, and Hugging Face's own top-k, top-p and temperature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tinker_core.sampling.drawing import NUCLEUS_GUESS, draw, invert
from tinker_core.sampling.numbers import uniforms, words
from tinker_core.types import SamplingParams

COUNT = 20_000


def even_numbers(count: int = COUNT) -> np.ndarray:
    """Evenly spaced quantiles: frequencies then equal probabilities up to 1 / count."""
    return (np.arange(count) + 0.5) / count


def shares(logits: torch.Tensor, **params: Any) -> np.ndarray:
    """How often each token is drawn from one row of logits over all quantiles."""
    drawn = draw(logits.expand(COUNT, -1), [SamplingParams(**params)] * COUNT, even_numbers())
    return np.bincount(drawn.tokens.numpy(), minlength=logits.shape[1]) / COUNT


def reference(logits: torch.Tensor, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0) -> np.ndarray:
    warped = TemperatureLogitsWarper(temperature)(None, logits.double()) if temperature != 1.0 else logits.double()
    if top_k > 0:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1.0:
        warped = TopPLogitsWarper(top_p)(None, warped)
    return warped.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 4},
        {"top_p": 0.6},
        {"top_k": 9, "top_p": 0.8, "temperature": 1.7},
        {"top_k": 1000},
    ],
)
@pytest.mark.parametrize("vocab_size", [11, 128, 300])
def test_frequencies_equal_the_reference_distribution(params: dict[str, Any], vocab_size: int) -> None:
    logits = 2.0 * torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    expected_params = {**params, "top_k": min(params.get("top_k", -1), vocab_size)}
    np.testing.assert_allclose(shares(logits, **params), reference(logits, **expected_params), atol=2.5 / COUNT)


def test_a_nucleus_wider_than_the_first_guess_is_still_exact() -> None:
    size = 4 * NUCLEUS_GUESS
    logits = 0.1 * torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    rows = 64
    drawn = draw(logits.expand(rows, -1), [SamplingParams(top_p=0.9)] * rows, even_numbers(rows))
    probabilities, order = reference(logits, top_p=0.9), logits[0].argsort(descending=True).numpy()
    ends = probabilities[order].cumsum()
    places = np.searchsorted(ends, even_numbers(rows), side="right")
    assert places.max() > NUCLEUS_GUESS
    np.testing.assert_array_equal(drawn.tokens.numpy(), order[places])


def test_each_row_follows_its_own_rule_and_reports_the_models_logprob() -> None:
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    rules = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.5, temperature=0.7),
        SamplingParams(temperature=2.0),
    ]
    numbers = np.linspace(0.1, 0.9, 5)
    together = draw(logits, rules, numbers)
    for row, rule in enumerate(rules):
        alone = draw(logits[row : row + 1], [rule], numbers[row : row + 1])
        assert alone.tokens[0] == together.tokens[row]
    assert together.tokens[1] == logits[1].argmax()
    expected = logits.log_softmax(-1).gather(1, together.tokens[:, None])[:, 0]
    torch.testing.assert_close(together.logprobs, expected)


def test_a_token_without_mass_is_never_drawn() -> None:
    mass = torch.zeros(1, 300)
    mass[0, [5, 140, 299]] = torch.tensor([1.0, 2.0, 1.0])
    quantiles = torch.tensor([[0.0, 0.2, 0.25, 0.7, 0.75, 1.0 - 2.0**-53]], dtype=torch.float64)
    assert invert(mass, quantiles)[0].tolist() == [5, 5, 140, 140, 299, 299]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_token_and_leave_other_rows_alone(bad: float) -> None:
    logits = torch.zeros(3, 20)
    logits[1, 7] = bad
    tokens = draw(logits, [SamplingParams(), SamplingParams(), SamplingParams(top_k=5)], np.full(3, 0.5)).tokens
    assert tokens[1] == -1
    assert (tokens[[0, 2]] >= 0).all()


def test_numbers_are_uniform_and_depend_on_every_word() -> None:
    numbers = uniforms(words([0]), words([7]), words(range(50_000)))
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.bincount((numbers * 50).astype(int), minlength=50)
    assert np.abs(counts - 1000).max() < 6 * np.sqrt(1000)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02
    base = uniforms(words([1]), words([2]), words([3]))
    for other in ([2], [2], [3]), ([1], [3], [3]), ([1], [2], [4]), ([2], [1], [3]):
        assert uniforms(*(words(part) for part in other)) != base
    assert uniforms(words([-1])) == uniforms(words([2**64 - 1]))
