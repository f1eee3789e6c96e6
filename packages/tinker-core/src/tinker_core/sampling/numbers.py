"""Random numbers for draws, made by hashing (seed, stream, sample, position).

So a number depends neither on what else is in a batch nor on any generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Stream(IntEnum):
    """What a random number is for; streams of one seed are independent."""

    SAMPLE = 0
    PROMPT_ALTERNATIVES = 1


def uniforms(*words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per element, a hash of that element of every word; the arrays broadcast."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def words(values: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Integers of any size and sign as 64-bit words."""
    return np.array([value & 0xFFFF_FFFF_FFFF_FFFF for value in values], dtype=np.uint64)
