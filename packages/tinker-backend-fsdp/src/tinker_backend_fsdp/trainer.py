"""The trainer ``fsdp``: many LoRA models on one frozen, sharded base model."""

from __future__ import annotations

from tinker_backend_fsdp.loading import load_model
from tinker_backend_fsdp.packed import FsdpPackedModel
from tinker_core.interfaces import RankContext, TrainerParts
from tinker_core.sampling.stopping import eos_tokens
from tinker_core.training.handle import LiveModelHandle
from tinker_core.training.packed_trainer import BaseModelShape, PackedTrainer, prepare_rank
from tinker_core.training.world import World


class FsdpTrainer(PackedTrainer):
    """Implements `tinker_core.interfaces.Trainer`, one instance per rank."""

    offers_handle = True

    def __init__(self, context: RankContext, parts: TrainerParts) -> None:
        prepare_rank(context)
        world = World(context)
        self._loaded = load_model(context.base_model.path, context.dtype, world)
        shape = BaseModelShape(
            linears=self._loaded.linears,
            dtype=self._loaded.dtype,
            vocab_size=self._loaded.vocab_size,
            context_length=self._loaded.context_length,
            architecture=self._loaded.architecture,
        )
        super().__init__(
            context, parts, world=world, model=FsdpPackedModel(root=self._loaded.root, world=world), shape=shape
        )

    def model_handle(self) -> LiveModelHandle:
        """The live model."""
        root = self._loaded.root
        return self.live_handle(root, eos_tokens(root.get_submodule("causal_lm"), self.context.base_model.path))
