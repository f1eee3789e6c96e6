"""The one model of a server for all parameters: its float32 row, gradient and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tinker_backend_megatron.full.files import (
    GRADIENT,
    MODEL,
    OPTIMIZER,
    Spool,
    finish_checkpoint,
    finish_model,
    has_files,
    read_rows,
)
from tinker_backend_megatron.full.layout import FullLayout
from tinker_backend_megatron.full.live import LiveWeights
from tinker_core.errors import CheckpointMismatchError
from tinker_core.interfaces import FlatOptimizer, StateWriter
from tinker_core.training.adapters import AdapterWeights
from tinker_core.training.host_copies import HostCopies
from tinker_core.training.peft_format import read_manifest
from tinker_core.training.state import ModelState, SavedState
from tinker_core.types import CheckpointManifest, CheckpointType, PreparedModel, SnapshotParts


class FullModelState(ModelState):
    """A `ModelState` whose weights are the parameters of the root."""

    def __init__(self, model: PreparedModel, live: LiveWeights, build_optimizer: Callable[[], FlatOptimizer]) -> None:
        """Starts from the base model's own weights; a collective. Raises `StorageError`."""
        self._live = live
        super().__init__(model, live.layout, build_optimizer, dtype=live.row.dtype, device=live.row.device)

    @property
    def _whole(self) -> FullLayout:
        return self._live.layout

    def _compute_copy(self) -> AdapterWeights:
        self._live.hold(self.row)
        return AdapterWeights(self.layout, self._live.row)

    def capture(self, base_model: str, kind: CheckpointType, parts: SnapshotParts, copies: HostCopies) -> StateWriter:
        """Write what a checkpoint of a kind holds to where it waits, in rank 0; the result moves it from there.

        Raises `StorageError`.
        """
        manifest, layout = self.manifest(kind, base_model), self._whole
        if kind is CheckpointType.SAMPLER:
            return capture_model(layout, self._live.row, manifest)
        spool = Spool(layout)
        spool.add(MODEL, {"": self.row})
        if parts.optimizer:
            spool.add(OPTIMIZER, {f"{name}.": row for name, row in self.optimizer.state().items()})
        if parts.gradient:
            spool.add(GRADIENT, {} if self.gradient is None else {"": self.gradient})
        spool.agree()
        return lambda directory: finish_checkpoint(spool, directory, manifest) if layout.world.rank == 0 else None

    def read(self, directory: Path, base_model: str, parts: SnapshotParts) -> SavedState:
        """Read and check this rank's part of a checkpoint into host memory; changes nothing.

        Raises `UserError` or `StorageError`.
        """
        manifest, layout = read_manifest(directory), self._whole
        self._check(manifest, base_model, parts)
        rows = read_rows(layout, directory, MODEL)
        if not rows:
            raise CheckpointMismatchError("the checkpoint has no weights")
        optimizer = self._build_optimizer()
        if parts.optimizer:
            _require(directory, OPTIMIZER, "optimizer state; load it without the optimizer")
            moments = read_rows(layout, directory, OPTIMIZER)
            optimizer.load({prefix[:-1]: row for prefix, row in moments.items()}, manifest.optimizer_steps)
        gradient = None
        if parts.gradient:
            _require(directory, GRADIENT, "accumulated gradient; load it without")
            gradient = read_rows(layout, directory, GRADIENT).get("")
        return SavedState(row=rows[""], optimizer=optimizer, gradient=gradient)

    def take(self, saved: SavedState) -> None:
        """Become what was read. The old rows go before the new ones come, so that a device holds them once."""
        optimizer, gradient, device = saved.optimizer, saved.gradient, self._device
        self.row.copy_(saved.row)
        self.optimizer, self.gradient = optimizer, None
        optimizer.load({name: row.to(device) for name, row in optimizer.state().items()}, optimizer.num_steps)
        self.gradient = None if gradient is None else gradient.to(device)
        self.refresh()

    def _check(self, manifest: CheckpointManifest, base_model: str, parts: SnapshotParts) -> None:
        pairs = [("base model", manifest.base_model, base_model)]
        if parts.optimizer:
            pairs.append(("optimizer", manifest.optimizer_config.type, self.model.optimizer_config.type))
        for what, theirs, ours in pairs:
            if theirs != ours:
                raise CheckpointMismatchError(f"the checkpoint has {what} {theirs!r}, the model has {ours!r}")
        if manifest.lora_config.rank != 0:
            raise CheckpointMismatchError(
                f"the checkpoint is a LoRA adapter of rank {manifest.lora_config.rank}, the model is all parameters of "
                "the base model; load it on a server without --full-parameter"
            )


def capture_model(layout: FullLayout, row: torch.Tensor, manifest: CheckpointManifest) -> StateWriter:
    """Write a row in compute type to where it waits; the result makes a model of it that Transformers loads.

    A collective. Raises `StorageError`.
    """
    spool = Spool(layout)
    spool.add(MODEL, {"": row})
    spool.agree()
    base, dtype = layout.directory, row.dtype
    return lambda directory: finish_model(spool, directory, manifest, base, dtype) if layout.world.rank == 0 else None


def _require(directory: Path, stem: str, what: str) -> None:
    if not has_files(directory, stem):
        raise CheckpointMismatchError(f"the checkpoint has no {what}")
