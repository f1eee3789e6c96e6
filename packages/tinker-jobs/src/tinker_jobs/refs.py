"""What the references of a request meant when it was submitted; a job uses exactly this, whatever is added later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class _Versioned:
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@attrs.frozen(kw_only=True)
class FrozenFile:
    """One file of a dataset."""

    path: str
    """Absolute."""
    size_bytes: int
    sha256: str


@attrs.frozen(kw_only=True)
class FrozenDataset(_Versioned):
    """A version of a dataset: one file per split."""

    splits: Mapping[str, FrozenFile]
    default_split: str
    """The one that is read when none is asked for."""


@attrs.frozen(kw_only=True)
class FrozenCapability(_Versioned):
    """A version of a capability."""

    prompt: str | None
    """Its system prompt."""
    runtime_digest: str
    """``sha256:`` and the hash over its sorted files."""


@attrs.frozen(kw_only=True)
class FrozenTask(_Versioned):
    """A version of a task."""

    content: Mapping[str, Any]
    """The task's file as it is."""

    @property
    def instruction(self) -> str | None:
        """What the policy is told; may hold ``{{ variables }}`` of a row's template context."""
        text = self.content.get("instruction")
        return None if text is None else str(text)

    @property
    def verification(self) -> Mapping[str, Any] | None:
        """How a result is verified."""
        found = self.content.get("verification")
        return found if isinstance(found, Mapping) else None


@attrs.frozen(kw_only=True)
class FrozenWorld:
    """A world to act in. Its token is read from its file when the job starts: no record holds it."""

    manifest_id: str
    path: str
    """Its file."""
    server_url: str
    goal: str | None = None
    runtime_id: str | None = None
    agent_name: str | None = None
    agent_prompt: str | None = None
    """System prompt of the agent that the runtime's capability provides."""


@attrs.frozen(kw_only=True)
class FrozenRefs:
    """All references of one request."""

    capability: FrozenCapability
    dataset: FrozenDataset | None = None
    eval_dataset: FrozenDataset | None = None
    prompt_dataset: FrozenDataset | None = None
    trajectory_datasets: tuple[FrozenDataset, ...] = ()
    task: FrozenTask | None = None
    world: FrozenWorld | None = None

    def artifacts(self) -> dict[str, Any]:
        """What a job's artifacts tell of those that it has."""
        found: dict[str, Any] = {}
        for name in ("capability", "dataset", "prompt_dataset", "eval_dataset", "task"):
            ref = getattr(self, name)
            if ref is not None:
                found[name] = str(ref)
        if self.trajectory_datasets:
            found["trajectory_datasets"] = [str(dataset) for dataset in self.trajectory_datasets]
        if self.world is not None:
            found |= {"world_manifest_id": self.world.manifest_id, "world_server_url": self.world.server_url}
        return found
