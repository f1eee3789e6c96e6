"""The seeds that vLLM is given."""

from __future__ import annotations

from tinker_core.sampling.numbers import uniforms, words

_SEED_BITS = 2.0**62


def sequence_seed(seed: int, index: int) -> int:
    """A seed of its own for each sequence of a request: neighbouring requests share none."""
    return int(uniforms(words([seed]), words([index]))[0] * _SEED_BITS)
