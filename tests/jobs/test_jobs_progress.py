"""How what a job reports becomes its metrics."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tinker_core.errors import InvalidRequestError
from tinker_jobs.records import LogRecord
from tinker_jobs.service.progress import Metrics, replay


def merged(*reports: dict[str, Any]) -> dict[str, Any]:
    metrics = Metrics()
    for report in reports:
        metrics.merge(report)
    return metrics.snapshot()


def test_series_grow_by_steps_and_numbers_are_overwritten() -> None:
    first = {"steps": [1], "train/loss": [3.0], "train/steps": 1}
    second = {"steps": [2, 3], "train/loss": [2.0, 1.0], "train/steps": 3}
    assert merged(first, second) == {"steps": [1, 2, 3], "train/loss": [3.0, 2.0, 1.0], "train/steps": 3}


def test_what_is_reported_again_for_a_step_takes_its_place() -> None:
    reports = ({"steps": [n], "train/loss": [value]} for n, value in ((1, 3.0), (2, 2.0), (2, 2.5), (1, 3.5)))
    assert merged(*reports) == {"steps": [1, 2], "train/loss": [3.5, 2.5]}


def test_evaluations_have_steps_of_their_own() -> None:
    both = {"steps": [2], "train/reward": [0.5], "eval/steps": [2], "eval/reward": [0.25]}
    found = merged({"steps": [1], "train/reward": [0.1]}, both)
    assert found == {"steps": [1, 2], "train/reward": [0.1, 0.5], "eval/steps": [2], "eval/reward": [0.25]}


def test_a_series_that_misses_steps_keeps_in_line_with_them() -> None:
    found = merged({"steps": [1], "a": [1.0]}, {"steps": [3], "a": [3.0], "b": [30.0]}, {"steps": [2], "b": [20.0]})
    assert found == {"steps": [1, 2, 3], "a": [1.0, None, 3.0], "b": [None, 20.0, 30.0]}


def test_the_whole_series_at_the_end_double_nothing() -> None:
    metrics = Metrics()
    metrics.merge({"steps": [1], "train/loss": [3.0], "notes": ["a"]})
    end = {"steps": [1, 2], "train/loss": [3.0, 2.0], "train_loss": [3.0, 2.0], "notes": ["a", "b"], "n": 2}
    for _ in range(2):
        metrics.merge(end, whole=True)
    assert metrics.snapshot() == end


def test_lists_without_steps_are_appended_to() -> None:
    assert merged({"x": [1]}, {"x": [2, 3]}) == {"x": [1, 2, 3]}


def test_a_name_may_change_between_number_list_and_series() -> None:
    first = {"steps": [1], "x": [1]}
    assert merged(first, {"x": 3}, {"steps": [2], "x": [5]}) == {"steps": [1, 2], "x": [None, 5]}
    assert merged(first, {"x": [4]}, {"steps": [2], "y": [5]}) == {"steps": [1, 2], "x": [1, 4], "y": [None, 5]}
    of_training, of_evaluation = {"steps": [1], "eval/x": [1]}, {"eval/steps": [7], "eval/x": [2]}
    found = merged(of_training, of_evaluation, {"steps": [2], "y": [5]})
    assert found == {"steps": [1, 2], "eval/steps": [7], "eval/x": [2], "y": [None, 5]}


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"steps": [1], "train/loss": [1.0, 2.0]}, "'train/loss' have 2 values for 1 steps"),
        ({"steps": ["one"], "train/loss": [1.0]}, "'steps' must be a list of numbers"),
        ({"steps": 1, "train/loss": [1.0]}, "'steps' must be a list of numbers"),
        ({"eval/steps": [1], "eval/loss": []}, "'eval/loss' have 0 values for 1 eval/steps"),
    ],
)
def test_a_series_that_does_not_fit_its_steps_is_refused(report: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        merged(report)


def test_a_log_tells_the_metrics_without_what_was_given_up() -> None:
    def step(number: int, loss: float) -> dict[str, Any]:
        return {"event_type": "step_complete", "metrics": {"steps": [number], "loss": [loss], "last": loss}}

    def saved(number: int) -> dict[str, Any]:
        return {"event_type": "checkpoint_saved", "resume_step": number}

    def resumed(number: int | None) -> dict[str, Any]:
        return {"event_type": "resumed", "resume_step": number}

    def replayed(*lines: dict[str, Any]) -> dict[str, Any]:
        common: dict[str, Any] = {"timestamp": datetime(2026, 1, 1, tzinfo=UTC), "level": "info", "message": ""}
        return replay(LogRecord(number=n, data={}, **common, **line) for n, line in enumerate(lines)).snapshot()

    begun = (step(1, 3.0), saved(1), step(2, 2.0), step(3, 1.0))
    assert replayed(*begun) == {"steps": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "last": 1.0}
    assert replayed(*begun, resumed(1)) == {"steps": [1], "loss": [3.0], "last": 3.0}
    again = (*begun, resumed(1), step(2, 2.5), saved(2), step(3, 1.5))
    assert replayed(*again, resumed(2)) == {"steps": [1, 2], "loss": [3.0, 2.5], "last": 2.5}
    assert replayed(*begun, resumed(None)) == {}
    assert replayed(*begun, {"event_type": "retried"}, step(1, 4.0)) == {"steps": [1], "loss": [4.0], "last": 4.0}
