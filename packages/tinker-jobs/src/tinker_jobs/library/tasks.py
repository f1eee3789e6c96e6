"""A task's folder: one file that says what to do and how the result is verified."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinker_jobs.errors import LibraryError
from tinker_jobs.library.folders import read_yaml, text_of
from tinker_jobs.refs import FrozenTask

TASK = "task.yaml"


def freeze_task(folder: Path, name: str, version: str) -> FrozenTask:
    """A task as it is now. Raises `LibraryError`."""
    where = f"task {name}@{version}: {TASK}"
    content = read_yaml(folder / TASK, where)
    text_of(content, "instruction", where)
    verification = content.get("verification")
    if verification is not None and not isinstance(verification, Mapping):
        raise LibraryError(f"{where}: verification must be a mapping with a method, got {verification!r:.60}")
    return FrozenTask(name=name, version=version, content=content)
