"""The trainer ``megatron``: many LoRA models on one frozen base model that ranks share by layers, matrices or data.

With ``--full-parameter`` it trains the base model itself, for one tenant at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from tinker_backend_megatron.architecture import plan_topology
from tinker_backend_megatron.bridges import WEIGHTS_BRIDGE, choose_bridge
from tinker_backend_megatron.full.option import FULL_PARAMETER
from tinker_backend_megatron.full.training import WHEN_TAKEN, FullTraining, check_is_adapter
from tinker_backend_megatron.loading import LoadedModel, choose_dtype, load_model
from tinker_backend_megatron.packed import MegatronPackedModel
from tinker_backend_megatron.pipeline import PipelinePackedModel
from tinker_backend_megatron.rows import ShardedLayout
from tinker_backend_megatron.sampling_root import SamplingRoot
from tinker_backend_megatron.te_option import uses_transformer_engine
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.errors import UnsupportedFeatureError
from tinker_core.interfaces import FlatOptimizer, OptimizerPlugin, RankContext, TrainerParts
from tinker_core.training.adapters import AdapterLayout
from tinker_core.training.handle import LiveModelHandle
from tinker_core.training.packed_trainer import BaseModelShape, PackedTrainer, prepare_rank
from tinker_core.training.passes import PackedModel
from tinker_core.training.state import ModelState, ModelTable
from tinker_core.types import PreparedModel, SettingValue, TrainerCapabilities


class MegatronTrainer(PackedTrainer):
    """Implements `tinker_core.interfaces.Trainer`, one instance per rank."""

    rows_are_whole = False

    def __init__(self, context: RankContext, parts: TrainerParts) -> None:
        prepare_rank(context)
        self._world, self._loaded = _load(context)
        is_full = bool(context.options.get(FULL_PARAMETER.name, False))
        self._full = FullTraining.of(self._loaded, self._world) if is_full else None
        architecture = self._loaded.architecture
        shape = BaseModelShape(
            linears=self._loaded.model_map.linears(),
            dtype=self._loaded.dtype,
            vocab_size=architecture.vocab_size,
            context_length=architecture.context_length,
            architecture=architecture.name,
        )
        super().__init__(
            context,
            parts,
            world=self._world,
            model=self._packed_model(),
            shape=shape,
            models=ModelTable(1, when_taken=WHEN_TAKEN) if is_full else None,
            one_by_one=is_full,
        )

    def _packed_model(self) -> PackedModel:
        is_pipeline = self._world.topology.pipeline > 1
        model: PackedModel = (PipelinePackedModel if is_pipeline else MegatronPackedModel)(
            root=self._loaded.root, world=self._world
        )
        return model if self._full is None else self._full.packed(model)

    def capabilities(self) -> TrainerCapabilities:
        """LoRA, or all parameters, on text, in process or as files."""
        found = attrs.evolve(super().capabilities(), offers_model_handle=self._world.topology.pipeline == 1)
        return found if self._full is None else attrs.evolve(found, max_lora_rank=0, max_models=1, full_parameter=True)

    def new_state(self, model: PreparedModel) -> ModelState:
        """A fresh adapter, or all parameters as they are in the base model."""
        if self._full is not None:
            return self._full.new_state(model, self.optimizer_builder)
        check_is_adapter(model.lora_config, self.context.max_lora_rank)
        return super().new_state(model)

    def shard(self, whole: AdapterLayout) -> ShardedLayout:
        """This rank's part of an adapter."""
        return ShardedLayout(whole, self._loaded.model_map.shards_of, self._world.rank, self._world)

    def build_optimizer(
        self, plugin: OptimizerPlugin, settings: dict[str, SettingValue], layout: AdapterLayout
    ) -> Callable[[], FlatOptimizer]:
        """For rows of which ranks hold parts; raises `UnsupportedFeatureError` for a family that cannot step those."""
        topology = self._world.topology
        if plugin.build_sharded is None and topology.tensor * topology.pipeline * topology.expert > 1:
            raise UnsupportedFeatureError(
                f"optimizer_config.type {plugin.name!r} cannot step rows that ranks share; use adamw, or a server "
                "without tensor, pipeline and expert parallelism"
            )
        return super().build_optimizer(plugin, settings, layout)

    def unload(self, model_id: str) -> None:
        """Forget a model; the base model becomes what it was. Raises `StorageError` when that cannot be read again."""
        super().unload(model_id)
        if self._full is not None and not self.models:
            self._full.live.restore_base()

    def model_handle(self) -> LiveModelHandle | None:
        """The live model, where one stage has all of it."""
        if self._world.topology.pipeline > 1:
            return None
        if self._full is not None:
            base_model = self.context.base_model.name
            return self._full.handle(self._loaded, self.models, self._world, self.capabilities(), base_model)
        return self.live_handle(SamplingRoot(self._loaded.root, self._world.topology.tensor), self._loaded.eos_tokens)


def _load(context: RankContext) -> tuple[MegatronWorld, LoadedModel]:
    """A rank's world, and its part of the model; leaves the world again when that cannot be loaded."""
    dtype = choose_dtype(context.dtype)
    transformer_engine = uses_transformer_engine(context)
    read_weights = choose_bridge(str(context.options.get(WEIGHTS_BRIDGE.name, WEIGHTS_BRIDGE.default)))
    world = MegatronWorld(context, plan_topology(context))
    try:
        loaded = load_model(
            context.base_model.path, dtype, world, transformer_engine=transformer_engine, read=read_weights
        )
    except Exception:
        world.close()
        raise
    return world, loaded
