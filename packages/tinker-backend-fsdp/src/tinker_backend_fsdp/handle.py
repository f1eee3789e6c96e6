"""The trainer's live model as a colocated sampler sees it."""

from __future__ import annotations

from tinker_backend_fsdp.loading import LoadedModel
from tinker_core.sampling.stopping import eos_tokens
from tinker_core.training.adapters import AdapterLayout
from tinker_core.training.handle import ANY_RANK, LiveModelHandle
from tinker_core.training.state import ModelTable
from tinker_core.training.targets import select_linears
from tinker_core.training.world import World
from tinker_core.types import BaseModelSpec, LoraConfig, TrainerCapabilities


def make_handle(
    loaded: LoadedModel, models: ModelTable, world: World, capabilities: TrainerCapabilities, base_model: BaseModelSpec
) -> LiveModelHandle:
    """The handle of a rank, in which rows are whole."""

    def make_layout(config: LoraConfig) -> AdapterLayout:
        return AdapterLayout(select_linears(loaded.linears, config, max_rank=ANY_RANK), config)

    return LiveModelHandle(
        model=loaded.root,
        models=models,
        world=world,
        capabilities=capabilities,
        base_model=base_model.name,
        dtype=loaded.dtype,
        eos_tokens=eos_tokens(loaded.root.get_submodule("causal_lm"), base_model.path),
        make_layout=make_layout,
    )
