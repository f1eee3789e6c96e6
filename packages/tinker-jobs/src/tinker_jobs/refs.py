"""What the references of a request meant when it was submitted; a job uses exactly this, whatever is added later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class FrozenFile:
    """One file of a dataset."""

    path: str
    """Absolute."""
    size_bytes: int
    sha256: str


@attrs.frozen(kw_only=True)
class FrozenDataset:
    """A version of a dataset: one file per split."""

    name: str
    version: str
    splits: Mapping[str, FrozenFile]
    default_split: str
    """The one that is read when none is asked for."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@attrs.frozen(kw_only=True)
class FrozenCapability:
    """A version of a capability."""

    name: str
    version: str
    prompt: str | None
    """Its system prompt."""
    runtime_digest: str
    """``sha256:`` and the hash over its sorted files."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@attrs.frozen(kw_only=True)
class FrozenTask:
    """A version of a task."""

    name: str
    version: str
    content: Mapping[str, Any]
    """The task's file as it is."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

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
