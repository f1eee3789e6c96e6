"""What a rank keeps of each model: rows. All ranks hold the same ones, or each its own part of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import torch

from tinker_core.errors import CapacityError, CheckpointMismatchError, InvalidRequestError, UnknownModelError
from tinker_core.interfaces import FlatOptimizer, StateWriter
from tinker_core.lora_targets import target_names
from tinker_core.training.adapters import AdapterGradient, AdapterLayout, AdapterWeights
from tinker_core.training.host_copies import HostCopies
from tinker_core.training.peft_format import (
    read_gradient,
    read_manifest,
    read_optimizer,
    read_weights,
    write_gradient,
    write_manifest,
    write_optimizer,
    write_weights,
)
from tinker_core.types import CheckpointManifest, CheckpointType, PreparedModel, PreparedOptimStep, SnapshotParts


@attrs.frozen(kw_only=True, eq=False)
class SavedState:
    """A checkpoint that was read and fits its model."""

    row: torch.Tensor
    optimizer: FlatOptimizer
    gradient: torch.Tensor | None


class ModelState:
    """One model: its float32 row, accumulated gradient, optimizer, and the copy in compute type that passes read."""

    def __init__(
        self,
        model: PreparedModel,
        layout: AdapterLayout,
        build_optimizer: Callable[[], FlatOptimizer],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model = model
        self.layout = layout
        self.gradient: torch.Tensor | None = None
        """Float32 row; None while nothing is accumulated, which means zero."""
        self._build_optimizer = build_optimizer
        self._dtype = dtype
        self._device = device
        self.optimizer = build_optimizer()
        assert model.lora_config.seed is not None
        self.row = layout.initial_row(model.lora_config.seed).to(device)
        self.weights = self._compute_copy()

    def refresh(self) -> None:
        """Renew the compute copy after the row has changed."""
        self.weights = self._compute_copy()

    def _compute_copy(self) -> AdapterWeights:
        # In float32 this is the row itself: passes only read it, and never while it changes.
        return AdapterWeights(self.layout, self.row.to(self._dtype))

    def new_gradient(self) -> AdapterGradient:
        """Zeros, for a pass to add to."""
        return AdapterGradient(self.layout, torch.zeros_like(self.row))

    def accumulate(self, gradient: torch.Tensor) -> None:
        """Add a pass's gradient; takes ownership of the row."""
        if self.gradient is None:
            self.gradient = gradient
        else:
            self.gradient += gradient

    def step(self, step: PreparedOptimStep) -> dict[str, float]:
        """Apply and clear the accumulated gradient; without one the gradient is zero. Raises `UserError`."""
        gradient = torch.zeros_like(self.row) if self.gradient is None else self.gradient
        metrics = self.optimizer.step(self.row, gradient, step)
        self.gradient = None
        self.refresh()
        return metrics

    def manifest(self, kind: CheckpointType, base_model: str) -> CheckpointManifest:
        """What a checkpoint of this model says of itself."""
        return CheckpointManifest(
            kind=kind,
            base_model=base_model,
            lora_config=self.model.lora_config,
            optimizer_config=self.model.optimizer_config,
            optimizer_steps=self.optimizer.num_steps,
        )

    def capture(self, base_model: str, kind: CheckpointType, parts: SnapshotParts, copies: HostCopies) -> StateWriter:
        """Copy what a checkpoint of a kind holds into host memory; the result writes it, in rank 0."""
        layout, manifest = self.layout.whole, self.manifest(kind, base_model)
        row = self.layout.collect(self.row, copies)
        moments: dict[str, torch.Tensor] = {}
        if parts.optimizer:
            for name, one in self.optimizer.state().items():
                found = self.layout.collect(one, copies)
                moments |= {} if found is None else {name: found}
        wanted = parts.gradient and self.gradient is not None
        gradient = self.layout.collect(self.gradient, copies) if wanted and self.gradient is not None else None

        def write(directory: str) -> None:
            if row is None:
                return  # rank 0 has it all
            target = Path(directory)
            try:
                write_weights(target, layout, row, manifest)
                if parts.optimizer:
                    write_optimizer(target, layout, moments)
                if parts.gradient:
                    write_gradient(target, layout, gradient)
                write_manifest(target, manifest)
            finally:
                copies.release([copy for copy in (row, *moments.values(), gradient) if copy is not None])

        return write

    def read(self, directory: Path, base_model: str, parts: SnapshotParts) -> SavedState:
        """Read and check a checkpoint for this model; changes nothing. Raises `UserError` or `StorageError`."""
        manifest = read_manifest(directory)
        self._check(manifest, base_model, parts)
        whole = self.layout.whole
        row = self._take_in(read_weights(directory, whole))
        optimizer = self._build_optimizer()
        if parts.optimizer:
            rows = {name: self._take_in(saved) for name, saved in read_optimizer(directory, whole).items()}
            optimizer.load(rows, manifest.optimizer_steps)
        gradient = read_gradient(directory, whole) if parts.gradient else None
        return SavedState(row=row, optimizer=optimizer, gradient=None if gradient is None else self._take_in(gradient))

    def _take_in(self, row: torch.Tensor) -> torch.Tensor:
        return self.layout.cut(row).to(self._device)

    def take(self, saved: SavedState) -> None:
        """Become what was read."""
        self.row, self.optimizer, self.gradient = saved.row, saved.optimizer, saved.gradient
        self.refresh()

    def _check(self, manifest: CheckpointManifest, base_model: str, parts: SnapshotParts) -> None:
        mine, saved = self.model.lora_config, manifest.lora_config
        pairs: list[tuple[str, object, object]] = [
            ("base model", manifest.base_model, base_model),
            ("LoRA rank", saved.rank, mine.rank),
            ("LoRA alpha", saved.alpha, mine.alpha),
            ("target modules", sorted(set(target_names(saved))), sorted(set(target_names(mine)))),
        ]
        if parts.optimizer:
            pairs.append(("optimizer", manifest.optimizer_config.type, self.model.optimizer_config.type))
        for what, theirs, ours in pairs:
            if theirs != ours:
                raise CheckpointMismatchError(f"the checkpoint has {what} {theirs!r}, the model has {ours!r}")


class ModelTable:
    """The models of a trainer by id."""

    def __init__(self, capacity: int, *, when_taken: str | None = None) -> None:
        """``when_taken``: what one model too many is told, where more cannot be had with ``--max-models``."""
        self._capacity = capacity
        self._when_taken = when_taken or (
            f"all {capacity} models of this server are in use; finish a session, or raise --max-models"
        )
        self._models: dict[str, ModelState] = {}

    def __len__(self) -> int:
        return len(self._models)

    def __getitem__(self, model_id: str) -> ModelState:
        if model_id not in self._models:
            raise UnknownModelError(model_id)
        return self._models[model_id]

    def check_room(self, model_id: str) -> None:
        """Raise when no model of this id can be added."""
        if model_id in self._models:
            raise InvalidRequestError(f"model {model_id!r} exists already")
        if len(self._models) >= self._capacity:
            raise CapacityError(self._when_taken)

    def add(self, state: ModelState) -> None:
        """Keep a model."""
        self._models[state.model.model_id] = state

    def remove(self, model_id: str) -> None:
        """Forget a model; unknown ids are ignored."""
        self._models.pop(model_id, None)
