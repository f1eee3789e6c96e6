"""Cut data into packed micro-batches: by a token budget, without padding, evenly over ranks.

Items stay in their given order, so data that are sorted by adapter give each micro-batch few, long segments.
"""

from __future__ import annotations

from collections.abc import Sequence

Bin = list[int]
"""Indices of the items of one micro-batch; empty for a rank that has nothing to do in a pass."""


def pack(lengths: Sequence[int], *, budget: int, num_ranks: int = 1) -> list[list[Bin]]:
    """Micro-batches as ``[pass][rank]``: every rank takes part in every pass.

    No bin holds more than ``budget`` tokens, except one item that alone is longer.  Among the cuts with the fewest
    passes the largest bin is as small as it can be.
    """
    if not lengths:
        return []
    bins = _cut(lengths, budget)
    slots = -(-len(bins) // num_ranks) * num_ranks
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_cut(lengths, middle)) <= slots:
            high = middle
        else:
            low = middle + 1
    bins = _cut(lengths, high)
    bins += [[] for _ in range(slots - len(bins))]
    return [bins[start : start + num_ranks] for start in range(0, slots, num_ranks)]


def _cut(lengths: Sequence[int], cap: int) -> list[Bin]:
    """Consecutive bins, each as full as ``cap`` allows."""
    bins: list[Bin] = []
    used = 0
    for index, length in enumerate(lengths):
        if not bins or used + length > cap:
            bins.append([])
            used = 0
        bins[-1].append(index)
        used += length
    return bins
