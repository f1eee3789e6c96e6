"""The trainer's live model as a colocated sampler sees it."""

from __future__ import annotations

from collections.abc import Callable

from tinker_backend_megatron.loading import LoadedModel
from tinker_backend_megatron.sampling_root import SamplingRoot
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.sampling.stopping import eos_tokens_of
from tinker_core.training.adapters import AdapterLayout
from tinker_core.training.handle import ANY_RANK, LiveModelHandle
from tinker_core.training.state import ModelTable
from tinker_core.training.targets import select_linears
from tinker_core.types import LoraConfig, TrainerCapabilities


def make_handle(
    loaded: LoadedModel,
    models: ModelTable,
    world: MegatronWorld,
    capabilities: TrainerCapabilities,
    base_model: str,
    shard: Callable[[AdapterLayout], AdapterLayout],
) -> LiveModelHandle:
    """The handle of a rank; ``shard`` gives its part of an adapter's whole layout."""
    linears = loaded.model_map.linears()

    def make_layout(config: LoraConfig) -> AdapterLayout:
        return shard(AdapterLayout(select_linears(linears, config, max_rank=ANY_RANK), config))

    return LiveModelHandle(
        model=SamplingRoot(loaded.root, world.topology.tensor),
        models=models,
        world=world,
        capabilities=capabilities,
        base_model=base_model,
        dtype=loaded.dtype,
        eos_tokens=eos_tokens_of(str(loaded.directory), loaded.architecture.hf_config),
        make_layout=make_layout,
    )
