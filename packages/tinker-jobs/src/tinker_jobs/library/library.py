"""Everything that references name: the datasets, capabilities, tasks and worlds of a data directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from tinker_jobs.library import adding
from tinker_jobs.library.capabilities import freeze_capability, read_agent_prompt, read_entry_prompt
from tinker_jobs.library.files import FileHashes
from tinker_jobs.library.folders import VersionFolders
from tinker_jobs.library.listing import capability_record, dataset_record, task_record, world_record
from tinker_jobs.library.names import split_ref, strip_organization
from tinker_jobs.library.records import CapabilityRecord, DatasetRecord, TaskRecord, WorldRecord
from tinker_jobs.library.resolution import Resolution
from tinker_jobs.library.splits import freeze_dataset
from tinker_jobs.library.tasks import freeze_task
from tinker_jobs.library.worlds import World, list_worlds, read_world, world_path
from tinker_jobs.refs import FrozenCapability, FrozenDataset, FrozenRefs, FrozenTask
from tinker_jobs.requests import CreateJobRequest

Record = TypeVar("Record")


class Library:
    """The versioned folders of a data directory. Thread-safe; all of it blocks."""

    def __init__(self, data_dir: Path, organization: str | None = None) -> None:
        self.organization = organization
        root = data_dir.absolute()
        self.datasets = VersionFolders(root / "datasets", "dataset")
        self.capabilities = VersionFolders(root / "capabilities", "capability")
        self.tasks = VersionFolders(root / "tasks", "task")
        self.worlds = root / "worlds"
        self._hashes = FileHashes()

    def resolve(self, request: CreateJobRequest) -> FrozenRefs:
        """All references of a request as they are now. Raises `JobRequestError` with every mistake."""
        return Resolution(self).refs(request)

    def freeze_dataset(self, name: str, version: str) -> FrozenDataset:
        """A version of a dataset as it is now. Raises `LibraryError`."""
        name = strip_organization(name, self.organization, "dataset")
        return freeze_dataset(self.datasets.find(name, version), name, version, self._hashes)

    def freeze_capability(self, name: str, version: str) -> FrozenCapability:
        """A version of a capability as it is now. Raises `LibraryError`."""
        name = strip_organization(name, self.organization, "capability")
        return freeze_capability(self.capabilities.find(name, version), name, version)

    def freeze_task(self, ref: str) -> FrozenTask:
        """A task by ``name@version``, or by its name alone in the highest version. Raises `LibraryError`."""
        name, version = split_ref(ref, "task") if "@" in ref else (ref, None)
        name = strip_organization(name, self.organization, "task")
        if version is None:
            version = self.tasks.latest(name)
        return freeze_task(self.tasks.find(name, version), name, version)

    def read_world(self, world_id: str) -> tuple[Path, World]:
        """A world's file and what it says, with its token. Raises `LibraryError`."""
        path = world_path(self.worlds, world_id)
        return path, read_world(path)

    def agent_prompt(self, capability: str, agent: str | None) -> str | None:
        """The prompt of an agent of ``name@version``; its entry agent's when none is named. Raises `LibraryError`."""
        name, version = split_ref(capability, "capability")
        name = strip_organization(name, self.organization, "capability")
        folder, what = self.capabilities.find(name, version), f"capability {name}@{version}"
        return read_entry_prompt(folder, what) if agent is None else read_agent_prompt(folder, agent, what)

    # --- adding -------------------------------------------------------------------------------------------------------

    def add_dataset(self, ref: str, files: Mapping[str | None, Path]) -> DatasetRecord:
        """Copy files, each a split, or with None the only one, into a new version.

        Raises `LibraryError` when the version exists, and for the first row that no job could use; then nothing is
        added. Of several that add the same version at once, one succeeds.
        """
        name, version = adding.version_of(ref, "dataset")
        adding.add_dataset(self.datasets, name, version, files)
        return dataset_record(self.datasets.find(name, version), name, version)

    def add_capability(self, ref: str, source: Path) -> CapabilityRecord:
        """Copy a capability's folder, or one file that is its prompt. Raises `LibraryError` as `add_dataset` does."""
        name, version = adding.version_of(ref, "capability")
        adding.add_capability(self.capabilities, name, version, source)
        return capability_record(self.capabilities.find(name, version), name, version)

    def add_task(self, ref: str, source: Path) -> TaskRecord:
        """Copy a task's folder, or its one file. Raises `LibraryError` as `add_dataset` does."""
        name, version = adding.version_of(ref, "task")
        adding.add_task(self.tasks, name, version, source)
        return task_record(self.tasks.find(name, version), name, version)

    def add_world(self, world_id: str, source: Path) -> WorldRecord:
        """Copy a world's file. Raises `LibraryError` as `add_dataset` does."""
        adding.add_world(self.worlds, world_id, source)
        return world_record(world_path(self.worlds, world_id))

    # --- listing ------------------------------------------------------------------------------------------------------

    def list_datasets(self) -> list[DatasetRecord]:
        """By name, and then by version, the lowest first; so are the other lists."""
        return _listed(self.datasets, dataset_record)

    def list_capabilities(self) -> list[CapabilityRecord]:
        """All capabilities."""
        return _listed(self.capabilities, capability_record)

    def list_tasks(self) -> list[TaskRecord]:
        """All tasks."""
        return _listed(self.tasks, task_record)

    def list_worlds(self) -> list[WorldRecord]:
        """All worlds."""
        return [world_record(self.worlds / f"{world_id}.yaml") for world_id in list_worlds(self.worlds)]


def _listed(folders: VersionFolders, record: Callable[[Path, str, str], Record]) -> list[Record]:
    return [
        record(folders.root / name / version, name, version)
        for name in folders.names()
        for version in folders.versions(name)
    ]
