"""The trainer's live model as a colocated sampler sees it."""

from __future__ import annotations

from pathlib import Path

import torch

from tinker_backend_megatron.loading import LoadedModel
from tinker_backend_megatron.root import MegatronRoot
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.errors import CheckpointMismatchError, TinkerError, UnsupportedFeatureError
from tinker_core.training.adapters import AdapterLayout, AdapterWeights
from tinker_core.training.peft_format import read_manifest, read_weights, write_manifest, write_weights
from tinker_core.training.state import ModelTable
from tinker_core.training.targets import select_linears
from tinker_core.types import CheckpointManifest, CheckpointType, TrainerCapabilities, Transport, WeightsRef

_ANY_RANK = 1 << 20


class FrozenAdapter(AdapterWeights):
    """A copy of adapter weights in compute type that no training changes, with what it takes to write it again."""

    def __init__(self, layout: AdapterLayout, row: torch.Tensor, manifest: CheckpointManifest) -> None:
        super().__init__(layout, row)
        self.manifest = manifest


class MegatronModelHandle:
    """Implements `tinker_core.interfaces.ModelHandle`."""

    def __init__(
        self,
        loaded: LoadedModel,
        models: ModelTable,
        world: MegatronWorld,
        capabilities: TrainerCapabilities,
        base_model: str,
    ) -> None:
        self._loaded = loaded
        self._models = models
        self._world = world
        self._capabilities = capabilities
        self._base_model = base_model

    @property
    def capabilities(self) -> TrainerCapabilities:
        """What the trainer says of itself."""
        return self._capabilities

    @property
    def model(self) -> MegatronRoot:
        """The root module."""
        return self._loaded.root

    @property
    def device(self) -> torch.device:
        """Where activations live."""
        return self._world.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute type."""
        return self._loaded.dtype

    def copy_adapter(self, ref: WeightsRef) -> FrozenAdapter:
        """A frozen copy of a live model's weights or of an exported directory."""
        if ref.transport is Transport.IN_PROCESS and ref.model_id is not None:
            state = self._models[ref.model_id]
            row = state.row.detach().to(self.dtype, copy=True)
            return FrozenAdapter(state.layout, row, state.manifest(CheckpointType.SAMPLER, self._base_model))
        if ref.transport is Transport.FILE and ref.directory is not None:
            return self._read_together(Path(ref.directory))
        raise UnsupportedFeatureError(f"weights cannot be copied by {ref.transport}; use in_process or file")

    def _read_together(self, directory: Path) -> FrozenAdapter:
        adapter, failure = None, None
        try:
            adapter = self._read(directory)
        except TinkerError as error:
            failure = error
        self._world.fail_together(failure)
        assert adapter is not None
        return adapter

    def _read(self, directory: Path) -> FrozenAdapter:
        manifest = read_manifest(directory)
        if manifest.base_model != self._base_model:
            raise CheckpointMismatchError(
                f"the weights are of base model {manifest.base_model!r}, not of {self._base_model!r}"
            )
        linears = select_linears(self._loaded.model_map.linears(), manifest.lora_config, max_rank=_ANY_RANK)
        layout = AdapterLayout(linears, manifest.lora_config)
        row = read_weights(directory, layout).to(self.device, self.dtype)
        return FrozenAdapter(layout, row, manifest)

    def save_adapter(self, adapter: object, directory: str) -> None:
        """Write a frozen copy as a PEFT directory; rank 0 writes."""
        assert isinstance(adapter, FrozenAdapter)
        if self._world.rank == 0:
            target = Path(directory)
            write_weights(target, adapter.layout, adapter.row, adapter.manifest)
            write_manifest(target, adapter.manifest)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's value of a tensor, in every rank."""
        return self._world.broadcast(tensor)
