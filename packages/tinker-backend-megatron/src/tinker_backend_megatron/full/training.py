"""What a trainer has besides when it trains all parameters."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from tinker_backend_megatron.full.gradients import FullPackedModel, GradientCollector
from tinker_backend_megatron.full.handle import FullModelHandle
from tinker_backend_megatron.full.layout import FullLayout
from tinker_backend_megatron.full.live import LiveWeights
from tinker_backend_megatron.full.state import FullModelState
from tinker_backend_megatron.loading import LoadedModel
from tinker_backend_megatron.sampling_root import SamplingRoot
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.errors import InvalidLoraConfigError
from tinker_core.interfaces import FlatOptimizer
from tinker_core.training.passes import PackedModel
from tinker_core.training.state import ModelTable
from tinker_core.types import LoraConfig, PreparedModel, TrainerCapabilities

WHEN_TAKEN = (
    "this server trains all parameters of one model at a time, and has that model; finish its session or unload it "
    "first, or use another server"
)
"""What the second model is told."""


MakeBuilder = Callable[[PreparedModel, FullLayout], Callable[[], FlatOptimizer]]
"""Gives what builds the optimizer that a model asks for."""


@attrs.frozen(kw_only=True, eq=False)
class FullTraining:
    """The parameters of a rank, on their way to be trained."""

    layout: FullLayout
    live: LiveWeights
    _collector: GradientCollector

    @classmethod
    def of(cls, loaded: LoadedModel, world: MegatronWorld) -> FullTraining:
        """Takes a loaded model over; a collective."""
        layout = FullLayout(loaded, world)
        live = LiveWeights(loaded, layout, world.device)
        padding: int | None = getattr(loaded.architecture.hf_config, "pad_token_id", None)
        return cls(layout=layout, live=live, collector=GradientCollector(loaded.root, layout, padding))

    def packed(self, model: PackedModel) -> FullPackedModel:
        """A packed model that computes the gradients of its parameters."""
        return FullPackedModel(model, self._collector)

    def handle(
        self,
        loaded: LoadedModel,
        models: ModelTable,
        world: MegatronWorld,
        capabilities: TrainerCapabilities,
        base_model: str,
    ) -> FullModelHandle:
        """What a colocated sampler is given; to be made before the first tenant comes."""
        return FullModelHandle(
            root=SamplingRoot(loaded.root, world.topology.tensor),
            live=self.live,
            models=models,
            world=world,
            capabilities=capabilities,
            base_model=base_model,
            eos_tokens=loaded.eos_tokens,
        )

    def new_state(self, model: PreparedModel, make_builder: MakeBuilder) -> FullModelState:
        """The model of a tenant; raises `InvalidLoraConfigError` for an adapter."""
        check_is_full(model.lora_config)
        return FullModelState(model, self.live, make_builder(model, self.layout))


def check_is_full(config: LoraConfig) -> None:
    """Raise `InvalidLoraConfigError` for an adapter, whose base model would change under it."""
    if config.rank != 0:
        raise InvalidLoraConfigError(
            f"lora_config.rank must be 0, got {config.rank}: this server trains all parameters (--full-parameter), "
            "which adapters would have under them; create the model with rank 0, or use a server without that option"
        )


def check_is_adapter(config: LoraConfig, max_rank: int) -> None:
    """Raise `InvalidLoraConfigError` for rank 0 where adapters are trained."""
    if config.rank == 0:
        raise InvalidLoraConfigError(
            f"lora_config.rank must be 1 to {max_rank}, got 0, which means all parameters: a server trains those when "
            "it is started with --full-parameter"
        )
