"""What the library holds. What no job can use is listed too, with why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinker_jobs.errors import LibraryError
from tinker_jobs.library.capabilities import freeze_capability
from tinker_jobs.library.folders import read_yaml
from tinker_jobs.library.records import CapabilityRecord, DatasetRecord, SplitRecord, TaskRecord, WorldRecord
from tinker_jobs.library.splits import MANIFEST, find_splits
from tinker_jobs.library.tasks import freeze_task
from tinker_jobs.library.worlds import read_world


def dataset_record(folder: Path, name: str, version: str) -> DatasetRecord:
    """What is known of a dataset without reading it."""
    what = f"dataset {name}@{version}"
    try:
        manifest = folder / MANIFEST
        counted = read_yaml(manifest, f"{what}: {MANIFEST}").get("num_rows") if manifest.exists() else None
        splits = {
            split: SplitRecord(size_bytes=path.stat().st_size, num_rows=_count(counted, split))
            for split, path in find_splits(folder, what).items()
        }
    except (LibraryError, OSError) as error:
        return DatasetRecord(name=name, version=version, error=str(error))
    return DatasetRecord(name=name, version=version, splits=splits)


def _count(counted: object, split: str) -> int | None:
    found = counted.get(split) if isinstance(counted, Mapping) else None
    return found if isinstance(found, int) else None


def capability_record(folder: Path, name: str, version: str) -> CapabilityRecord:
    """A capability as jobs would have it."""
    try:
        found = freeze_capability(folder, name, version)
    except LibraryError as error:
        return CapabilityRecord(name=name, version=version, error=str(error))
    return CapabilityRecord(name=name, version=version, prompt=found.prompt, runtime_digest=found.runtime_digest)


def task_record(folder: Path, name: str, version: str) -> TaskRecord:
    """A task as jobs would have it."""
    try:
        found = freeze_task(folder, name, version)
    except LibraryError as error:
        return TaskRecord(name=name, version=version, error=str(error))
    method = None if found.verification is None else str(found.verification.get("method", "flag"))
    return TaskRecord(name=name, version=version, instruction=found.instruction, verification=method)


def world_record(path: Path) -> WorldRecord:
    """A world as jobs would have it, without its token."""
    try:
        found = read_world(path)
    except LibraryError as error:
        return WorldRecord(world_id=path.stem, error=str(error))
    return WorldRecord(world_id=path.stem, server_url=found.server_url, goal=found.goal, runtimes=tuple(found.runtimes))
