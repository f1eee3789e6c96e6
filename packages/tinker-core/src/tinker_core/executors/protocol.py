"""The commands between an engine and the ranks of a worker group."""

from __future__ import annotations

from typing import Any

import attrs

from tinker_core.encoding import Nothing
from tinker_core.types import (
    ModelPassResult,
    OptimStepResult,
    PreparedModel,
    PreparedModelPassBatch,
    PreparedOptimStep,
    PreparedSample,
    SampleOutput,
    SamplerCapabilities,
    SnapshotParts,
    TrainerCapabilities,
    WeightsRef,
)


@attrs.frozen(kw_only=True)
class GroupCapabilities:
    """What the ranks of a group offer together."""

    trainer: TrainerCapabilities
    sampler: SamplerCapabilities | None
    """None when the group has no sampler in its ranks."""


@attrs.frozen(kw_only=True)
class ModelName:
    """A command about one model."""

    model_id: str


@attrs.frozen(kw_only=True)
class StateCall:
    """Snapshot, restore or export of one model in one directory."""

    model_id: str
    directory: str
    parts: SnapshotParts = SnapshotParts()
    background: bool = False
    """Snapshot and export: write while the ranks go on with other commands, after they have copied the state. The
    answer comes when the files are complete, or with the reason why they are not."""


@attrs.frozen(kw_only=True)
class PublishCall:
    """New weights for the rank samplers."""

    revision: str
    ref: WeightsRef


@attrs.frozen(kw_only=True)
class SaveRevisionCall:
    """A revision to write into a directory while the ranks go on; it stays resident."""

    revision: str
    directory: str


@attrs.frozen(kw_only=True)
class RetireCall:
    """A revision to drop."""

    revision: str


@attrs.frozen(kw_only=True)
class CancelCall:
    """A sample request to drop."""

    request_id: str


@attrs.frozen(kw_only=True)
class WaitingCall:
    """A sample request to ask about."""

    request_id: str


METHODS: dict[str, tuple[Any, Any]] = {
    "capabilities": (Nothing, GroupCapabilities),
    "create": (PreparedModel, Nothing),
    "forward_backward": (PreparedModelPassBatch, tuple[ModelPassResult, ...]),
    "optim_step": (tuple[PreparedOptimStep, ...], tuple[OptimStepResult, ...]),
    "snapshot": (StateCall, Nothing),
    "restore": (StateCall, Nothing),
    "export": (StateCall, Nothing),
    "unload": (ModelName, Nothing),
    "publish": (PublishCall, Nothing),
    "save_revision": (SaveRevisionCall, Nothing),
    "retire": (RetireCall, Nothing),
    "sample": (PreparedSample, SampleOutput),
    "cancel": (CancelCall, Nothing),
    "is_waiting": (WaitingCall, bool),
}
"""Payload and answer type of every command."""
