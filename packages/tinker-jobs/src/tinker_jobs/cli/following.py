"""A job's log as it grows: lines, and on a terminal a bar below them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import orjson
from tqdm import tqdm

from tinker_jobs.cli.client import JobsClient
from tinker_jobs.cli.parsing import short_time
from tinker_jobs.protocol import STEPS, EventType

_SHOWN = {
    "train/loss": "loss",
    "train/reward": "reward",
    "eval/loss": "eval loss",
    "eval/reward": "eval reward",
    "train/staleness": "staleness",
}
"""Metrics beside the bar -> what they are called there."""


class Display(Protocol):
    """Where a followed log goes."""

    def show(self, entry: Mapping[str, Any]) -> None:
        """Show a line of the log."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class LineDisplay:
    """A line each: text, or JSON."""

    def __init__(self, output_format: str) -> None:
        self._format = output_format

    def show(self, entry: Mapping[str, Any]) -> None:
        """Print the line at once."""
        sys.stdout.write(render_entry(entry, self._format))
        sys.stdout.flush()

    def close(self) -> None:
        """Nothing to restore."""


class BarDisplay:
    """A bar of the optimizer steps with the newest metrics; all lines but those of steps stand above it."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] = tqdm(unit="step", file=sys.stderr, dynamic_ncols=True)
        self._numbers: dict[str, str] = {}

    def show(self, entry: Mapping[str, Any]) -> None:
        """Move the bar, or print the line above it."""
        event, metrics = entry["event_type"], entry["metrics"]
        numbers = {_SHOWN[name]: _newest(value) for name, value in metrics.items() if name in _SHOWN}
        self._numbers |= {name: f"{number:.4g}" for name, number in numbers.items() if number is not None}
        self._bar.set_postfix(self._numbers, refresh=False)
        step = _newest(metrics.get(STEPS))
        if event == EventType.STEP_COMPLETE and step is not None:
            self._bar.n = int(step)
            self._bar.refresh()
            return
        if event == EventType.TRAINING_START:
            settings = entry["data"]
            self._bar.total = settings.get("num_steps", settings.get("steps"))
        self._bar.write(render_entry(entry, "table").rstrip("\n"), file=sys.stdout)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@contextmanager
def open_display(output_format: str) -> Iterator[Display]:
    """A bar where somebody looks at it, else lines."""
    on_terminal = output_format == "table" and sys.stdout.isatty() and sys.stderr.isatty()
    display: Display = BarDisplay() if on_terminal else LineDisplay(output_format)
    try:
        yield display
    finally:
        display.close()


def follow(client: JobsClient, job_id: str, display: Display | None) -> dict[str, Any]:
    """Show a job's log until it ends, or with None only wait; the job at its end."""
    job: dict[str, Any] = {}
    for event, content in client.follow(job_id):
        if event == "status":
            job = content
        elif event == "lost":
            sys.stderr.write(f"connection lost ({content['message']}); taking it up again\n")
        elif event == "log" and display is not None:
            display.show(content)
    return job


def render_entry(entry: Mapping[str, Any], output_format: str) -> str:
    """A line of a log."""
    if output_format == "json":
        return orjson.dumps(entry).decode() + "\n"
    return f"{short_time(entry['timestamp'])} {entry['level']:<7} {entry['message']}\n"


def _newest(value: object) -> float | None:
    """A number, or the last one of a list; None for anything else, such as a loss that was none."""
    newest = value[-1] if isinstance(value, list) and value else value
    return float(newest) if isinstance(newest, int | float) else None
