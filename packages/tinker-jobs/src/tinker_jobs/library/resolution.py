"""The references of one request: each as it is now, or why it cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from tinker_jobs.errors import JobRequestError, LibraryError, Mistake
from tinker_jobs.library.splits import evaluation_split
from tinker_jobs.library.worlds import World
from tinker_jobs.refs import FrozenDataset, FrozenRefs, FrozenTask, FrozenWorld
from tinker_jobs.requests import (
    CreateJobRequest,
    DatasetRef,
    RayGRPOJobConfig,
    TinkerRLJobConfig,
    TinkerSFTJobConfig,
)

if TYPE_CHECKING:
    from tinker_jobs.library.library import Library

Found = TypeVar("Found")


class Resolution:
    """Goes through a request and collects what is wrong with it."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._mistakes: list[Mistake] = []

    def refs(self, request: CreateJobRequest) -> FrozenRefs:
        """Everything that the request names. Raises `JobRequestError` with every mistake."""
        asked = request.capability_ref
        capability = self._try(lambda: self._library.freeze_capability(asked.name, asked.version), "capability_ref")
        refs = self._refs_of(request.config)
        if self._mistakes or capability is None:
            raise JobRequestError(self._mistakes)
        return FrozenRefs(capability=capability, **refs)

    def _refs_of(self, config: TinkerSFTJobConfig | TinkerRLJobConfig | RayGRPOJobConfig) -> dict[str, Any]:
        match config:
            case TinkerSFTJobConfig():
                return {
                    "dataset": self._dataset(config.dataset_ref, "dataset_ref"),
                    "eval_dataset": self._eval_dataset(config.eval_dataset_ref),
                    "trajectory_datasets": self._trajectories(config.trajectory_dataset_refs),
                }
            case TinkerRLJobConfig():
                return {
                    "prompt_dataset": self._prompts(config.prompt_dataset_ref, config.prompt_split),
                    "eval_dataset": self._eval_dataset(config.eval_dataset_ref),
                    "trajectory_datasets": self._trajectories(config.trajectory_dataset_refs),
                    "task": self._task(config.task_ref),
                    "world": self._world(config),
                }
            case RayGRPOJobConfig():
                return {
                    "prompt_dataset": self._dataset(config.prompt_dataset_ref, "prompt_dataset_ref"),
                    "task": self._task(config.task_ref),
                }

    def _dataset(self, ref: DatasetRef | None, *loc: str | int) -> FrozenDataset | None:
        dataset = self._find_dataset(ref, *loc)
        if dataset is not None and dataset.default_split not in dataset.splits:
            self._note(f"{dataset} has no split {dataset.default_split!r} ({_splits(dataset)})", "config", *loc)
        return dataset

    def _find_dataset(self, ref: DatasetRef | None, *loc: str | int) -> FrozenDataset | None:
        if ref is None:
            return None
        return self._try(lambda: self._library.freeze_dataset(ref.name, ref.version), "config", *loc)

    def _eval_dataset(self, ref: DatasetRef | None) -> FrozenDataset | None:
        dataset = self._find_dataset(ref, "eval_dataset_ref")
        if dataset is None:
            return None
        split = evaluation_split(dataset.splits)
        if split not in dataset.splits:
            self._note(f"{dataset} has no split to evaluate on ({_splits(dataset)})", "config", "eval_dataset_ref")
        return attrs.evolve(dataset, default_split=split)

    def _prompts(self, ref: DatasetRef | None, split: str | None) -> FrozenDataset | None:
        if split is None:
            return self._dataset(ref, "prompt_dataset_ref")
        if ref is None:
            self._note("prompt_split requires prompt_dataset_ref", "config", "prompt_split")
        dataset = self._find_dataset(ref, "prompt_dataset_ref")
        if dataset is None:
            return None
        if split not in dataset.splits:
            self._note(f"{dataset} has no split {split!r} ({_splits(dataset)})", "config", "prompt_split")
        return attrs.evolve(dataset, default_split=split)

    def _trajectories(self, refs: list[DatasetRef]) -> tuple[FrozenDataset, ...]:
        found = [self._dataset(ref, "trajectory_dataset_refs", index) for index, ref in enumerate(refs)]
        return tuple(dataset for dataset in found if dataset is not None)

    def _task(self, ref: str | None) -> FrozenTask | None:
        return None if ref is None else self._try(lambda: self._library.freeze_task(ref), "config", "task_ref")

    def _world(self, config: TinkerRLJobConfig) -> FrozenWorld | None:
        world_id, goal = config.world_manifest_id, config.world_goal
        if world_id is None:
            return None
        found = self._try(lambda: self._library.read_world(world_id), "config", "world_manifest_id")
        if found is None:
            return None
        path, world = found
        frozen = FrozenWorld(
            manifest_id=world_id,
            path=str(path),
            server_url=world.server_url,
            goal=world.goal if goal is None else goal,
            runtime_id=config.world_runtime_id,
            agent_name=config.world_agent_name,
        )
        return attrs.evolve(frozen, agent_prompt=self._agent_prompt(frozen, world))

    def _agent_prompt(self, frozen: FrozenWorld, world: World) -> str | None:
        runtime_id, agent = frozen.runtime_id, frozen.agent_name
        if runtime_id is None:
            return None
        runtime = world.runtimes.get(runtime_id)
        if runtime is None:
            known = ", ".join(world.runtimes) or "none"
            message = f"world {frozen.manifest_id} has no runtime {runtime_id!r} (known runtimes: {known})"
            self._note(message, "config", "world_runtime_id")
            return None
        if agent is not None and runtime.agents is not None and agent not in runtime.agents:
            message = f"runtime {runtime_id} has no agent {agent!r} (known agents: {', '.join(runtime.agents)})"
            self._note(message, "config", "world_agent_name")
            return None
        field = "world_runtime_id" if agent is None else "world_agent_name"
        return self._try(lambda: self._library.agent_prompt(runtime.capability, agent), "config", field)

    def _try(self, find: Callable[[], Found], *path: str | int) -> Found | None:
        try:
            return find()
        except LibraryError as error:
            self._note(str(error), *path)
            return None

    def _note(self, message: str, *path: str | int) -> None:
        self._mistakes.append(Mistake.in_body(message, *path))


def _splits(dataset: FrozenDataset) -> str:
    return f"known splits: {', '.join(dataset.splits)}"
