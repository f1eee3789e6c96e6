"""The live model of a trainer of all parameters, as a colocated sampler sees it.

A revision is a copy of all parameters in host memory, and so is the base model itself, which training moves away from.
For each forward the copy that it asks for takes the place of the parameters, so a forward is of one revision: a sampler
decodes sequences of several revisions one revision after the other, see `TrainerCapabilities.full_parameter`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from tinker_backend_megatron.full.files import read_model
from tinker_backend_megatron.full.live import LiveWeights
from tinker_backend_megatron.full.state import capture_model
from tinker_backend_megatron.root import Unembed
from tinker_backend_megatron.sampling_root import SamplingRoot
from tinker_core.errors import CheckpointMismatchError
from tinker_core.interfaces import StateWriter
from tinker_core.training.adapters import AdapterLayout, Segment
from tinker_core.training.attention import AttentionPlan
from tinker_core.training.handle import FrozenAdapter, LiveModelHandle
from tinker_core.training.peft_format import read_manifest
from tinker_core.training.state import ModelTable
from tinker_core.training.world import World
from tinker_core.types import CheckpointType, LoraConfig, TrainerCapabilities, Transport, WeightsRef

R = TypeVar("R")


class FullSamplingRoot(nn.Module):
    """A `SamplingRoot` that computes with the weights that its segments name, the base model's own without any."""

    def __init__(self, root: SamplingRoot, live: LiveWeights) -> None:
        """To be made while the parameters are the base model's own, which it keeps a copy of."""
        super().__init__()
        assert live.is_base
        self._root, self._live = root, live
        self._base = to_host(live.row)

    def forward(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        plan: AttentionPlan,
        segments: tuple[Segment, ...],
        head: Callable[[torch.Tensor, Unembed], R],
    ) -> R:
        """Run the layers and return ``head(hidden_TH, unembed)``; all tokens must be of one revision."""
        rows = {id(row): row for row in (self._row(segment) for segment in segments)} or {0: self._base}
        (row,) = rows.values()
        with self._live.replaced(row):
            found: R = self._root(input_ids_1T, position_ids_1T, plan, segments, head)
        return found

    def _row(self, segment: Segment) -> torch.Tensor:
        return self._base if segment.weights is None else segment.weights.row


class FullModelHandle(LiveModelHandle):
    """Implements `tinker_core.interfaces.ModelHandle` for the one model of a trainer of all parameters."""

    def __init__(
        self,
        *,
        root: SamplingRoot,
        live: LiveWeights,
        models: ModelTable,
        world: World,
        capabilities: TrainerCapabilities,
        base_model: str,
        eos_tokens: frozenset[int],
    ) -> None:
        super().__init__(
            model=FullSamplingRoot(root, live),
            models=models,
            world=world,
            capabilities=capabilities,
            base_model=base_model,
            dtype=live.row.dtype,
            eos_tokens=eos_tokens,
            make_layout=self._layout_of,
        )
        self._live = live

    def _layout_of(self, config: LoraConfig) -> AdapterLayout:
        if config.rank != 0:
            raise CheckpointMismatchError(
                f"the weights are a LoRA adapter of rank {config.rank}, this server trains and serves all parameters "
                "(--full-parameter); sample from them on a server without that option"
            )
        return self._live.layout

    def copy_adapter(self, ref: WeightsRef) -> FrozenAdapter:
        """All parameters of the live model, or of an exported directory, in host memory."""
        if ref.transport is Transport.IN_PROCESS and ref.model_id is not None:
            state = self._models[ref.model_id]
            manifest = state.manifest(CheckpointType.SAMPLER, self._base_model)
            return FrozenAdapter(self._live.layout, to_host(self._live.row), manifest)
        return super().copy_adapter(ref)

    def _read(self, directory: Path) -> FrozenAdapter:
        manifest = read_manifest(directory)
        self._check_base(manifest)
        layout = self._layout_of(manifest.lora_config)
        row = torch.zeros(layout.size, dtype=self.dtype)
        read_model(self._live.layout, directory, row)
        return FrozenAdapter(layout, row, manifest)

    def capture_adapter(self, adapter: object) -> StateWriter:
        """Something that writes a copy as a model, from which `copy_adapter` makes the same copy."""
        assert isinstance(adapter, FrozenAdapter)
        return capture_model(self._live.layout, adapter.row, adapter.manifest)


def to_host(row: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that no training changes."""
    return row.detach().to("cpu", copy=True)
