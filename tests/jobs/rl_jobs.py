"""Reinforcement-learning jobs for tests: their specification, and their trainer run in this process."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.jobs.workers import make_refs, make_spec
from tinker_jobs.protocol import EventType, JobEvent, JobSpec
from tinker_jobs.refs import FrozenDataset, FrozenFile
from tinker_jobs.rl.trainer import run_rl
from tinker_jobs.worker.run import JobRun

PLUGINS = ("jobs", "tests.jobs.digit_recipe")
REF = {"name": "prompts", "version": "1.0.0"}


def write_dataset(directory: Path, rows: Sequence[Mapping[str, Any]], name: str = "prompts") -> FrozenDataset:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = path.read_bytes()
    file = FrozenFile(path=str(path), size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return FrozenDataset(name=name, version="1.0.0", splits={"train": file}, default_split="train")


def rl_spec(
    url: str,
    model: str,
    directory: Path,
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    refs: Mapping[str, Any] | None = None,
    **fields: Any,
) -> JobSpec:
    """A job on ``rows`` as its prompts."""
    request = {
        "backend": "tinker",
        "trainer_type": "rl",
        "config": {"algorithm": "importance_sampling", "prompt_dataset_ref": REF, **config},
    }
    found = make_refs(prompt_dataset=write_dataset(directory, rows), **(refs or {}))
    return make_spec(url, model, directory, request, **{"refs": found, "plugins": PLUGINS, **fields})


def train(
    spec: JobSpec, cancelled: threading.Event | None = None, notice: Callable[[JobEvent], None] = lambda _: None
) -> list[JobEvent]:
    """What the trainer reports, in this process: its errors are raised. ``notice`` is given each event at once."""
    events: list[JobEvent] = []

    def send(event: JobEvent) -> None:
        events.append(event)
        notice(event)

    run = JobRun(spec, send, cancelled or threading.Event())
    with run.service:
        run_rl(run)
    return events


def of_type(events: Sequence[JobEvent], event_type: EventType) -> list[JobEvent]:
    return [event for event in events if event.event_type is event_type]


def final_metrics(events: Sequence[JobEvent]) -> Mapping[str, Any]:
    (end,) = of_type(events, EventType.TRAINING_END)
    return end.metrics


def messages(events: Sequence[JobEvent], level: str) -> list[str]:
    return [event.message for event in events if event.level == level]
