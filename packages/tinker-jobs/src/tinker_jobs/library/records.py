"""What the library holds, in short: what is printed about it."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen(kw_only=True)
class SplitRecord:
    """One split of a dataset."""

    size_bytes: int
    num_rows: int | None
    """None for a dataset that was not added with a command, whose rows nobody has counted."""


@attrs.frozen(kw_only=True)
class DatasetRecord:
    """A version of a dataset."""

    name: str
    version: str
    splits: Mapping[str, SplitRecord] = attrs.field(factory=dict)
    error: str | None = None
    """Why no job can use it."""


@attrs.frozen(kw_only=True)
class CapabilityRecord:
    """A version of a capability."""

    name: str
    version: str
    prompt: str | None = None
    runtime_digest: str | None = None
    error: str | None = None
    """Why no job can use it."""


@attrs.frozen(kw_only=True)
class TaskRecord:
    """A version of a task."""

    name: str
    version: str
    instruction: str | None = None
    verification: str | None = None
    """The method."""
    error: str | None = None
    """Why no job can use it."""


@attrs.frozen(kw_only=True)
class WorldRecord:
    """A world."""

    world_id: str
    server_url: str | None = None
    goal: str | None = None
    runtimes: tuple[str, ...] = ()
    error: str | None = None
    """Why no job can use it."""
