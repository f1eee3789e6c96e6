"""GRPO jobs for tests: their specification, and who of Ray is still there."""

from __future__ import annotations

import os
import re
import select
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.jobs.rl_jobs import PLUGINS, REF, of_type, write_dataset
from tests.jobs.workers import make_refs, make_spec
from tinker_jobs.protocol import EventType, JobEvent, JobSpec
from tinker_jobs.refs import FrozenTask

READY = re.compile(r"rollout worker #\d+ on \S+/(\d+) is ready")


def make_task(instruction: str | None = None, **grpo: Any) -> FrozenTask:
    content = {"instruction": instruction, "grpo": grpo or None}
    return FrozenTask(name="task", version="1.0.0", content=content)


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


def processes_with(text: str) -> dict[int, str]:
    """Command lines by process, of those that have a text in them or in their environment."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (directory / "environ").read_bytes(), (directory / "cmdline").read_bytes()
        except OSError:  # it has ended, or is ending
            continue
        if text.encode() in environment + command:
            found[int(directory.name)] = command.replace(b"\0", b" ").decode().strip()
    return found


def outliving(text: str, seconds: float = 60.0) -> dict[int, str]:
    """Those of `processes_with` that have not ended after so long: Ray's workers end when they miss their node."""
    return {pid: command for pid, command in processes_with(text).items() if not _ends(pid, seconds)}


def _ends(pid: int, seconds: float) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def stop_by_force(pid: int) -> None:
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
