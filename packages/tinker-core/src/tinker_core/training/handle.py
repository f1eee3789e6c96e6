"""A trainer's live model as a colocated sampler sees it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tinker_core.errors import CheckpointMismatchError, UnsupportedFeatureError
from tinker_core.interfaces import StateWriter
from tinker_core.training.adapters import AdapterLayout, AdapterWeights
from tinker_core.training.host_copies import HostCopies
from tinker_core.training.peft_format import read_manifest, read_weights, write_manifest, write_weights
from tinker_core.training.state import ModelTable
from tinker_core.training.world import World
from tinker_core.types import (
    CheckpointManifest,
    CheckpointType,
    LoraConfig,
    TrainerCapabilities,
    Transport,
    WeightsRef,
)

ANY_RANK = 1 << 20
"""For `select_linears`: weights that were saved once may be read again, whatever the bound is now."""


class FrozenAdapter(AdapterWeights):
    """A copy of adapter weights in compute type that no training changes, with what it takes to write it again."""

    def __init__(self, layout: AdapterLayout, row: torch.Tensor, manifest: CheckpointManifest) -> None:
        super().__init__(layout, row)
        self.manifest = manifest


class LiveModelHandle:
    """Implements `tinker_core.interfaces.ModelHandle` for trainers that keep a `ModelTable`."""

    def __init__(
        self,
        *,
        model: nn.Module,
        models: ModelTable,
        world: World,
        capabilities: TrainerCapabilities,
        base_model: str,
        dtype: torch.dtype,
        eos_tokens: frozenset[int],
        make_layout: Callable[[LoraConfig], AdapterLayout],
    ) -> None:
        """``make_layout`` gives this rank's layout of an adapter; raises `InvalidLoraConfigError`."""
        self.capabilities = capabilities
        self.model = model
        self.device = world.device
        self.dtype = dtype
        self.eos_tokens = eos_tokens
        self._models = models
        self._world = world
        self._base_model = base_model
        self._make_layout = make_layout
        self._copies = HostCopies()

    def copy_adapter(self, ref: WeightsRef) -> FrozenAdapter:
        """A frozen copy of a live model's weights or of an exported directory."""
        if ref.transport is Transport.IN_PROCESS and ref.model_id is not None:
            state = self._models[ref.model_id]
            row = state.row.detach().to(self.dtype, copy=True)
            return FrozenAdapter(state.layout, row, state.manifest(CheckpointType.SAMPLER, self._base_model))
        if ref.transport is Transport.FILE and ref.directory is not None:
            return self._world.together(partial(self._read, Path(ref.directory)))
        raise UnsupportedFeatureError(f"weights cannot be copied by {ref.transport}; use in_process or file")

    def _read(self, directory: Path) -> FrozenAdapter:
        manifest = read_manifest(directory)
        self._check_base(manifest)
        layout = self._make_layout(manifest.lora_config)
        row = layout.cut(read_weights(directory, layout.whole)).to(self.device, self.dtype)
        return FrozenAdapter(layout, row, manifest)

    def _check_base(self, manifest: CheckpointManifest) -> None:
        if manifest.base_model != self._base_model:
            raise CheckpointMismatchError(
                f"the weights are of base model {manifest.base_model!r}, not of {self._base_model!r}"
            )

    def capture_adapter(self, adapter: object) -> StateWriter:
        """Collect a frozen copy in rank 0; the writer makes a PEFT directory there."""
        assert isinstance(adapter, FrozenAdapter)
        layout, manifest = adapter.layout.whole, adapter.manifest
        is_whole = layout is adapter.layout
        # A whole row never changes, so it needs no copy; parts of one come together here, where all ranks are.
        row = adapter.row if is_whole else adapter.layout.collect(adapter.row, self._copies)

        def write(directory: str) -> None:
            if self._world.rank != 0:
                return
            assert row is not None
            try:
                write_weights(Path(directory), layout, row, manifest)
                write_manifest(Path(directory), manifest)
            finally:
                if not is_whole:
                    self._copies.release([row])

        return write

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's value of a tensor, in every rank."""
        return self._world.broadcast(tensor)
