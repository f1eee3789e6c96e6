"""Supervised jobs on a real server, in the test's own process: datasets, a trainer's run, what it reported."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tests.jobs.conftest import JobServer
from tests.jobs.workers import make_refs, make_spec
from tinker_jobs.errors import CancelledJobError
from tinker_jobs.protocol import EventType, JobEvent, JobSpec, ResumePoint
from tinker_jobs.refs import FrozenDataset, FrozenFile
from tinker_jobs.sft.trainer import run_sft
from tinker_jobs.worker.run import JobRun

Row = Mapping[str, Any]


def write_dataset(directory: Path, name: str, rows: Sequence[Row]) -> FrozenDataset:
    directory.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path = directory / f"{name}.jsonl"
    path.write_bytes(content)
    file = FrozenFile(path=str(path), size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return FrozenDataset(name=name, version="1.0.0", splits={"train": file}, default_split="train")


def sums(count: int, start: int = 0) -> list[Row]:
    """Questions of several lengths with their answers."""
    numbers = range(start, start + count)
    return [
        {"prompt": f"{7**number % 1000} + {number}?", "answer": str(7**number % 1000 + number)} for number in numbers
    ]


def sft_spec(server: JobServer, directory: Path, config: Row, refs: Row, **fields: Any) -> JobSpec:
    """A job on datasets that are frozen already; its request names them."""
    named = {
        f"{field}_ref": {"name": refs[field].name, "version": refs[field].version}
        for field in ("dataset", "eval_dataset")
        if field in refs
    }
    trajectories = [{"name": one.name, "version": one.version} for one in refs.get("trajectory_datasets", ())]
    request = {
        "model": fields.pop("model", server.model),
        "capability_ref": {"name": "helper", "version": "1.0.0"},
        "backend": "tinker",
        "trainer_type": "sft",
        "config": {**named, "trajectory_dataset_refs": trajectories, **config},
    }
    return make_spec(server.url, server.model, directory, request, refs=make_refs(**refs), **fields)


@attrs.frozen
class Outcome:
    events: list[JobEvent]
    was_cancelled: bool

    def of(self, event_type: EventType) -> list[JobEvent]:
        return [event for event in self.events if event.event_type is event_type]

    @property
    def end(self) -> JobEvent:
        (event,) = self.of(EventType.TRAINING_END)
        return event

    @property
    def steps(self) -> list[int]:
        return [event.metrics["steps"][0] for event in self.of(EventType.STEP_COMPLETE)]

    @property
    def saved(self) -> list[str]:
        """Names of the checkpoints."""
        return [event.data["path"].rsplit("/", 1)[1] for event in self.of(EventType.CHECKPOINT_SAVED)]

    @property
    def resume(self) -> ResumePoint:
        """Where a later process goes on."""
        last = self.of(EventType.CHECKPOINT_SAVED)[-1].resume
        assert last is not None
        return last


def run_job(spec: JobSpec, listen: Callable[[JobEvent, threading.Event], None] | None = None) -> Outcome:
    """Run a trainer to its end; ``listen`` may cancel it."""
    events: list[JobEvent] = []
    cancelled = threading.Event()

    def send(event: JobEvent) -> None:
        events.append(event)
        if listen is not None:
            listen(event, cancelled)

    run = JobRun(spec, send, cancelled)
    with run.service:
        try:
            run_sft(run)
        except CancelledJobError:
            return Outcome(events, True)
    return Outcome(events, False)
