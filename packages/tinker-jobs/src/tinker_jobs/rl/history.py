"""What a job has reported step by step, and the sums of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Protocol

from tinker_jobs.protocol import EVAL_STEPS, STEPS
from tinker_jobs.rl.rollouts import Rollout, RolloutGroup

_NUM_SYNCS = "train/weight_sync_count"
_AT_THE_END = {"train/reward_max": "train/reward_max_per_step", "train/reward_min": "train/reward_min_per_step"}
"""Series whose names belong to single numbers once the job is complete."""


class Drawing(Protocol):
    """Whatever draws rollouts, such as `tinker_jobs.rl.schedule.Schedule`, and how far it is."""

    @property
    def synced_version(self) -> int:
        """The version that the policy has at least."""

    @property
    def num_syncs(self) -> int:
        """Times that this process refreshed the policy."""

    @property
    def generation_step(self) -> int:
        """The last step whose rollouts were begun."""

    @property
    def num_pending(self) -> int:
        """Groups that are under way or ready, beyond those trained on."""


class History:
    """Series of a job by name, and what they come to; a job that was resumed goes on with those it had."""

    def __init__(self, reported: Mapping[str, Any], first_step: int) -> None:
        """``reported`` is the job's metrics so far; what they hold of ``first_step`` and later is left out."""
        self._rows: dict[str, dict[int, dict[str, float]]] = {
            axis: _rows_of(reported, axis, first_step) for axis in (STEPS, EVAL_STEPS)
        }
        rows = self._rows[STEPS]
        # What draws begins to count anew with each process.
        self._num_syncs_before = int(rows[max(rows)].get(_NUM_SYNCS, 0)) if rows else 0

    def add_step(self, group: RolloutGroup, schedule: Drawing) -> dict[str, Any]:
        """Take a step's numbers; what to report of it."""
        rewards = [rollout.reward for rollout in group.rollouts]
        row = {
            "train/reward": fmean(rewards),
            "train/reward_max": max(rewards),
            "train/reward_min": min(rewards),
            "train/num_rollouts_per_step": len(rewards),
            "train/model_version": group.step,
            "train/last_synced_model_version": schedule.synced_version,
            _NUM_SYNCS: self._num_syncs_before + schedule.num_syncs,
            "train/staleness": group.step - 1 - group.version,
            "train/generation_step": schedule.generation_step,
            "train/pending_generation_groups": schedule.num_pending,
            **_means(group.rollouts),
        }
        return self._add(STEPS, group.step, row)

    def add_evaluation(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Take an evaluation's numbers; what to report of it."""
        return self._add(EVAL_STEPS, step, dict(metrics))

    def summary(self) -> dict[str, Any]:
        """All of it: numbers about the whole job, and the series."""
        rows = [self._rows[STEPS][step] for step in sorted(self._rows[STEPS])]
        return {
            **{_AT_THE_END.get(name, name): values for name, values in _series(STEPS, self._rows[STEPS]).items()},
            **_series(EVAL_STEPS, self._rows[EVAL_STEPS]),
            **_totals(rows),
        }

    def _add(self, axis: str, step: int, row: dict[str, float]) -> dict[str, Any]:
        self._rows[axis][step] = row
        return {axis: [step], **{name: [value] for name, value in row.items()}}


def _totals(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    if not rows:
        return {}
    counts = [row["train/num_rollouts_per_step"] for row in rows]
    last = rows[-1]
    return {
        "train/steps": last["train/model_version"],
        "train/num_rollouts": sum(counts),
        "train/reward_mean": fmean([row["train/reward"] for row in rows], counts),
        "train/reward_max": max(row["train/reward_max"] for row in rows),
        "train/reward_min": min(row["train/reward_min"] for row in rows),
        "async/generation_step": last["train/generation_step"],
        "async/training_step": last["train/model_version"],
        "async/model_version": last["train/model_version"],
        "async/last_synced_model_version": last["train/last_synced_model_version"],
        "async/weight_sync_count": last[_NUM_SYNCS],
        "async/max_staleness_observed": max(row["train/staleness"] for row in rows),
        "async/max_pending_generation_groups": max(row["train/pending_generation_groups"] for row in rows),
    }


def _means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The means of what rollouts were measured by, each over those that have it."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for name, value in rollout.metrics.items():
            found[name].append(float(value))
    return {name: fmean(values) for name, values in found.items()}


def _rows_of(reported: Mapping[str, Any], axis: str, first_step: int) -> dict[int, dict[str, float]]:
    steps = reported.get(axis, ())
    prefix = axis.removesuffix(STEPS)
    rows: dict[int, dict[str, float]] = {int(step): {} for step in steps if step < first_step}
    for name, values in reported.items():
        is_series = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == len(steps)
        if not is_series or name in (STEPS, EVAL_STEPS) or name.startswith("eval/") != bool(prefix):
            continue
        for step, value in zip(steps, values, strict=True):
            if step in rows and value is not None:
                rows[int(step)][name] = value
    return rows


def _series(axis: str, rows: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Columns beside their axis, with None where a step lacks a number that others have."""
    if not rows:
        return {}
    steps = sorted(rows)
    names = dict.fromkeys(name for step in steps for name in rows[step])
    return {axis: steps, **{name: [rows[step].get(name) for step in steps] for name in names}}
