from __future__ import annotations

import random

import pytest

from tinker_core.training.packing import pack


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_packed_once_in_order_within_the_budget(num_ranks: int, seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 40) for _ in range(draw.randint(1, 60))]
    passes = pack(lengths, budget=32, num_ranks=num_ranks)
    assert all(len(bins) == num_ranks for bins in passes)
    flat = [index for bins in passes for bin_ in bins for index in bin_]
    assert flat == list(range(len(lengths)))
    for bin_ in (bin_ for bins in passes for bin_ in bins):
        assert len(bin_) <= 1 or sum(lengths[index] for index in bin_) <= 32


def test_micro_batches_are_even_when_that_costs_no_pass() -> None:
    assert pack([5] * 8, budget=30, num_ranks=2) == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    assert pack([5] * 7, budget=30) == [[[0, 1, 2, 3]], [[4, 5, 6]]]


def test_a_longer_item_goes_alone() -> None:
    assert pack([3, 100, 3], budget=10) == [[[0]], [[1]], [[2]]]


def test_ranks_without_work_get_an_empty_bin() -> None:
    assert pack([4], budget=10, num_ranks=3) == [[[0], [], []]]
    assert pack([], budget=10) == []
