"""A job's process without the service around it: what it is told, what it reports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinker_jobs.protocol import JobEvent, JobSpec, decode_event, encode
from tinker_jobs.refs import FrozenCapability, FrozenRefs


def make_refs(**refs: Any) -> FrozenRefs:
    capability = FrozenCapability(name="helper", version="1.0.0", prompt=None, runtime_digest="sha256:00")
    return FrozenRefs(**{"capability": capability, **refs})


def make_spec(url: str, model: str, directory: Path, request: Mapping[str, Any], **fields: Any) -> JobSpec:
    """``request`` needs backend, trainer_type and config; the rest has defaults. ``model`` is a name and a path."""
    directory.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "job_id": "job-1",
        "attempt": 1,
        "request": {"model": model, "capability_ref": {"name": "helper", "version": "1.0.0"}, **request},
        "refs": make_refs(),
        "base_model": model,
        "model_path": model,
        "base_url": url,
        "api_key": "tml-local",
        "directory": directory,
    }
    return JobSpec(**{**values, **fields})


class WorkerProcess:
    """``python -m tinker_jobs.worker``; end it by leaving the block."""

    def __init__(self, spec: JobSpec, prefix: Sequence[str] = ()) -> None:
        """``prefix`` is a command that runs a command."""
        self._log = (spec.directory / "worker.log").open("ab")
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tinker_jobs.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdin is not None
        self.process.stdin.write(encode(spec))
        self.process.stdin.flush()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(timeout=120)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self._log.close()

    def send(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def events(self) -> Iterator[JobEvent]:
        """Events as they come, to the end of the process."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield decode_event(line)


def run_worker(spec: JobSpec) -> list[JobEvent]:
    """All events of a job's process, which must end by itself."""
    with WorkerProcess(spec) as worker:
        events = list(worker.events())
        assert worker.process.wait(timeout=60) == 0, (spec.directory / "worker.log").read_text()
    return events
