"""GRPO jobs for tests: their specification, and who of Ray is still there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.jobs.rl_jobs import PLUGINS, REF, of_type, write_dataset
from tests.jobs.workers import make_refs, make_spec
from tinker_jobs.protocol import EventType, JobEvent, JobSpec
from tinker_jobs.refs import FrozenTask

READY = re.compile(r"rollout worker #\d+ on \S+/(\d+) is ready")


def make_task(**grpo: Any) -> FrozenTask:
    return FrozenTask(name="task", version="1.0.0", content={"grpo": grpo} if grpo else {})


def grpo_spec(
    url: str,
    model: str,
    directory: Path,
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    task: FrozenTask,
    **fields: Any,
) -> JobSpec:
    """A job on ``rows`` as its prompts."""
    request = {
        "backend": "ray",
        "trainer_type": "rl",
        "config": {"task_ref": str(task), "prompt_dataset_ref": REF, **config},
    }
    refs = make_refs(prompt_dataset=write_dataset(directory, rows), task=task)
    return make_spec(url, model, directory, request, **{"refs": refs, "plugins": PLUGINS, **fields})


def ready_pid(event: JobEvent) -> int | None:
    """The process of a rollout worker that an event announces."""
    found = READY.search(event.message)
    return None if found is None else int(found.group(1))


def trained_positions(events: Sequence[JobEvent]) -> list[int]:
    """The prompts of all steps, by their positions, in order."""
    steps = of_type(events, EventType.STEP_COMPLETE)
    return sorted(position for event in steps for position in event.data["prompt_positions"])


def processes_with(text: str) -> list[str]:
    """Command lines of processes of which one argument or environment variable holds a text."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (directory / "environ").read_bytes(), (directory / "cmdline").read_bytes()
        except OSError:  # it has ended, or is ending
            continue
        if text.encode() in environment + command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


def stop_by_force(pid: int) -> None:
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
