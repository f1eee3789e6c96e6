"""The trainer ``nano``: a model that can run packed micro-batches, in what `tinker_core.training` has for trainers."""

from __future__ import annotations

from collections.abc import Generator

import torch

from tinker_backend_nano.loading import load_llama
from tinker_backend_nano.model import Llama
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import RankContext, TrainerParts
from tinker_core.training.handle import LiveModelHandle
from tinker_core.training.logprobs import LossHead
from tinker_core.training.micro_batch import PassLayout
from tinker_core.training.packed_trainer import BaseModelShape, PackedTrainer, prepare_rank
from tinker_core.training.passes import PackedModel, PassTally
from tinker_core.training.world import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NanoPackedModel(PackedModel):
    """Runs the micro-batches of a pass."""

    def __init__(self, llama: Llama, world: World) -> None:
        self.llama, self.world = llama, world

    def run(self, layout: PassLayout, tally: PassTally) -> Generator[None, None, None]:
        for bins in layout.passes:
            batch = layout.micro_batch(bins[self.world.rank], tally.gradients, self.world.device)
            head = LossHead(batch.head_data, batch.segments, num_owners=len(layout.requests))
            with torch.set_grad_enabled(layout.needs_gradient(bins)):
                hidden, result = self.llama(batch.input_ids, batch.position_ids, batch.plan, batch.segments, head)
            if result.grad_hidden is not None:
                # Adapters' gradients go to their own rows on the way.
                torch.autograd.backward(hidden, result.grad_hidden)
            tally.fail(result.failure)
            tally.add(batch.items, result)
            yield  # samples and other work have their turn here


class NanoTrainer(PackedTrainer):
    """One instance per rank; all ranks hold the same, and rank 0 answers."""

    offers_handle = True

    def __init__(self, context: RankContext, parts: TrainerParts) -> None:
        if context.dtype not in DTYPES:
            raise ConfigurationError(f"dtype {context.dtype!r} is not supported; use {' or '.join(DTYPES)}")
        prepare_rank(context)
        dtype, world = DTYPES[context.dtype], World(context)
        self.llama = load_llama(context.base_model.path, dtype, world.device)
        shape = BaseModelShape(
            linears=self.llama.install_lora(),
            dtype=dtype,
            vocab_size=self.llama.config["vocab_size"],
            context_length=self.llama.config["max_position_embeddings"],
            architecture="llama",
        )
        super().__init__(context, parts, world=world, model=NanoPackedModel(self.llama, world), shape=shape)

    def model_handle(self) -> LiveModelHandle:
        end = self.llama.config.get("eos_token_id")
        return self.live_handle(self.llama, frozenset([] if end is None else end if isinstance(end, list) else [end]))
