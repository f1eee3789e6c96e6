"""Which examples each optimizer step learns from."""

from __future__ import annotations

from functools import lru_cache

import attrs
import numpy as np
from numpy.typing import NDArray


@attrs.frozen(kw_only=True)
class Schedule:
    """Every example once an epoch, in an order of the epoch's own.

    A step's examples depend on nothing but these fields, so a resumed job does the steps that it would have done.
    """

    num_examples: int
    batch_size: int
    """Examples in one ``forward_backward``; the last of an epoch may have fewer."""
    accumulation: int
    """Batches in one optimizer step; the last of an epoch may have fewer."""
    steps: int | None
    epochs: int | None
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every example once."""
        return -(-self.num_examples // (self.batch_size * self.accumulation))

    @property
    def total_steps(self) -> int:
        """The smaller of what ``steps`` and ``epochs`` ask for; one epoch when neither is set."""
        if self.epochs is None:
            return self.steps_per_epoch if self.steps is None else self.steps
        by_epochs = self.epochs * self.steps_per_epoch
        return by_epochs if self.steps is None else min(self.steps, by_epochs)

    def batches(self, step: int) -> list[NDArray[np.int64]]:
        """Indices of the examples of a step, counted from 1, by batch."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        per_step = self.batch_size * self.accumulation
        chosen = _order(self.num_examples, self.seed, epoch)[place * per_step : (place + 1) * per_step]
        return [chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size)]

    def epochs_completed(self, step: int) -> int:
        """Whole epochs behind a step."""
        return step // self.steps_per_epoch


@lru_cache(maxsize=2)
def _order(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


@attrs.frozen(kw_only=True)
class Checkpoints:
    """After which steps weights are saved, and under which names: every ``interval``, and after the last."""

    interval: int
    total_steps: int

    def name(self, step: int) -> str | None:
        """``checkpoint-{k}-step{n}``; None for a step that is not saved."""
        if step % self.interval and step != self.total_steps:
            return None
        return f"checkpoint-{-(-step // self.interval)}-step{step}"
