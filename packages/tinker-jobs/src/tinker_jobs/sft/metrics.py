"""What a supervised job reports of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from tinker import types

from tinker_jobs.sft.examples import Example


def token_loss(outputs: Sequence[types.ForwardBackwardOutput], batches: Sequence[Sequence[Example]]) -> float:
    """Mean negative log-probability, in nats, of the tokens to be learned in all batches."""
    total, count = 0.0, 0
    for output, batch in zip(outputs, batches, strict=True):
        for values, example in zip(output.loss_fn_outputs, batch, strict=True):
            logprobs = np.asarray(values["logprobs"].to_numpy(), np.float64)
            total -= float(logprobs[example.is_learned[1:]].sum())
            count += example.num_learned
    return total / count


@attrs.frozen(kw_only=True)
class StepReport:
    """One optimizer step."""

    step: int
    loss: float
    """Nats per learned token, before the step."""
    learning_rate: float
    num_sequences: int
    num_tokens: int
    """That went into the model."""

    def metrics(self) -> dict[str, Any]:
        """As a live event carries it."""
        return series([self])


_SERIES = {
    "steps": "step",
    "train/loss": "loss",
    "train_loss": "loss",
    "train/learning_rate": "learning_rate",
    "learning_rate": "learning_rate",
    "train/num_sequences": "num_sequences",
    "train/num_tokens": "num_tokens",
}
"""Metrics by step, and what they are of; two have a second name that clients of old know."""


def series(reports: Sequence[StepReport]) -> dict[str, Any]:
    """Steps as lists beside each other."""
    return {name: [getattr(report, field) for report in reports] for name, field in _SERIES.items()}


def reports_of(metrics: Mapping[str, Any], last_step: int) -> list[StepReport]:
    """Steps up to ``last_step`` out of what a job had reported: the inverse of `series`."""
    # JSON has no NaN, which a loss may be: it comes back as nothing.
    fields = {
        field: [math.nan if value is None else value for value in metrics.get(name, [])]
        for name, field in _SERIES.items()
    }
    columns = zip(*fields.values(), strict=True)
    reports = (StepReport(**dict(zip(fields, column, strict=True))) for column in columns)
    return [report for report in reports if report.step <= last_step]


def summary(reports: Sequence[StepReport]) -> dict[str, Any]:
    """The whole of training in numbers."""
    losses = [report.loss for report in reports]
    return {
        "train/steps": len(reports),
        "train/num_sequences_processed": sum(report.num_sequences for report in reports),
        "train/num_tokens_processed": sum(report.num_tokens for report in reports),
        "train/loss_last": losses[-1],
        "train/loss_mean": sum(losses) / len(losses),
        "train/loss_best": min(losses),
    }
