"""One rank's part of a causal language model: embedding on the first stage, layers, output projection on the last.

Parameters have the names of Megatron-Core's ``GPTModel``, so that tools for its checkpoints know them.

Shapes: T packed tokens, t those of this rank (T, or T / tensor-parallel with sequence parallelism), N some tokens,
H hidden size, V vocabulary, v the part of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tinker_backend_megatron.architecture import Architecture
from tinker_backend_megatron.context import PassContext
from tinker_backend_megatron.spec import block_spec
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.training.adapters import Segment
from tinker_core.training.attention import AttentionPlan
from tinker_core.training.lora import add_lora
from tinker_core.training.vocabulary import Vocabulary, VocabularyShard, WholeVocabulary

R = TypeVar("R")


class VocabularyRange:
    """The tokens whose rows of embedding and output projection a rank holds; those at the end may be padding."""

    def __init__(self, size: int, world: MegatronWorld) -> None:
        ranks, rank = world.topology.tensor, world.place.tensor
        self.size = size
        self.width = -(-size // ranks)
        """Rows with padding, the same in all ranks."""
        self.padded_size = self.width * ranks
        """Rows of all ranks."""
        self.start = min(size, rank * self.width)
        self.end = min(size, self.start + self.width)


class Unembed:
    """The output projection's rows of this rank, with every segment's own LoRA on it."""

    name = "lm_head"

    def __init__(self, weight: torch.Tensor, tokens: VocabularyRange, world: MegatronWorld) -> None:
        self._padded, self._tokens, self._world = weight, tokens, world
        self.vocabulary: Vocabulary = (
            WholeVocabulary(tokens.size)
            if world.topology.tensor == 1
            else VocabularyShard(tokens.start, tokens.end, tokens.width, world.gather_tensor_parallel)
        )
        self.weight_gradient: torch.Tensor | None = None
        """Where the gradient of the weight is added, float32 ``[v, H]``; None while it is frozen."""

    @property
    def weight(self) -> torch.Tensor:
        """``[v, H]`` without padding."""
        return self._padded[: self._tokens.end - self._tokens.start]

    @torch.no_grad()
    def partial_logits(self, hidden_NH: torch.Tensor, segments_N: tuple[Segment, ...]) -> torch.Tensor:
        """Logits ``[N, v]`` of this rank's tokens."""
        logits = F.linear(hidden_NH, self.weight)
        add_lora(logits, hidden_NH, self.name, segments_N)
        return logits

    @torch.no_grad()
    def logits(self, hidden_NH: torch.Tensor, segments_N: tuple[Segment, ...]) -> torch.Tensor:
        """Logits ``[N, V]`` of all tokens, in every rank: for samplers, which draw from them."""
        logits = self.partial_logits(hidden_NH, segments_N)
        if self._world.topology.tensor == 1:
            return logits
        padded = F.pad(logits, (0, self._tokens.width - logits.shape[1]))
        found = self._world.gather_tensor_parallel(padded)
        return found.transpose(0, 1).flatten(1)[:, : self._tokens.size]


class Embedding(nn.Module):
    """The token embedding, under the name that Megatron-Core gives it."""

    def __init__(self, tokens: VocabularyRange, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            num_embeddings=tokens.padded_size,
            embedding_dim=config.hidden_size,
            init_method=nn.init.zeros_,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=group,
        )
        # Rows beyond the vocabulary are never read from a checkpoint.
        nn.init.zeros_(self.word_embeddings.weight)

    def forward(self, input_ids_1T: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[t, 1, H]``."""
        hidden: torch.Tensor = self.word_embeddings(input_ids_1T)
        is_scattered = self.word_embeddings.reduce_scatter_embeddings
        return hidden if is_scattered else hidden.transpose(0, 1).contiguous()


class OutputLayer(nn.Module):
    """Rows of the output projection, under the name that Megatron-Core gives them."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class MegatronRoot(MegatronModule):  # type: ignore[misc]
    """The modules of one rank; called as a whole, with a head that is chosen per call."""

    model_type = ModelType.encoder_or_decoder
    """What Megatron-Core's schedules want to know."""

    def __init__(
        self, architecture: Architecture, config: TransformerConfig, world: MegatronWorld, context: PassContext
    ) -> None:
        super().__init__(config=config)
        self._context, self._world = context, world
        self.tokens = VocabularyRange(architecture.vocab_size, world)
        layers = world.topology.layers_of(world.place.pipeline, architecture.num_layers)
        first, last = world.is_first_stage, world.is_last_stage
        self.embedding = Embedding(self.tokens, config, world.tensor_group) if first else None
        self.decoder = TransformerBlock(
            config=config, spec=block_spec(architecture, config, len(layers)), pre_process=first, post_process=last
        )
        self.output_layer = OutputLayer(self._output_weight(architecture, config)) if last else None
        self.rotary: Any = LlamaRotaryEmbedding(architecture.hf_config).to(world.device)
        self.unembed: Unembed | None = None
        if self.output_layer is not None:
            self.unembed = Unembed(self.output_layer.weight, self.tokens, world)

    @property
    def world(self) -> MegatronWorld:
        """The ranks that share the model."""
        return self._world

    def _output_weight(self, architecture: Architecture, config: TransformerConfig) -> nn.Parameter:
        if architecture.ties_embeddings and self.embedding is not None:
            weight = self.embedding.word_embeddings.weight
            assert isinstance(weight, nn.Parameter)
            return weight
        shape = (self.tokens.width, config.hidden_size)
        return nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=self._world.device))

    def set_input_tensor(self, input_tensor: Any) -> None:  # noqa: ANN401 - Megatron-Core's schedules decide
        """Take the previous stage's hidden states."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def serving(self, tenants: tuple[Segment, ...]) -> AbstractContextManager[None]:
        """Forwards over segments of these owners, also by other ranks: experts compute tokens of several ranks."""
        return self._context.serving(tenants)

    def hidden_states(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        plan: AttentionPlan,
        segments: tuple[Segment, ...],
    ) -> torch.Tensor:
        """This stage's output ``[t, 1, H]``."""
        like = torch.empty((), dtype=self.config.params_dtype, device=position_ids_1T.device)
        cos, sin = self.rotary(like, position_ids_1T)
        with self._context.forward(plan, segments, (cos[0], sin[0])):
            hidden = None if self.embedding is None else self.embedding(input_ids_1T)
            found: torch.Tensor = self.decoder(hidden_states=hidden, attention_mask=None)
        return found

    def whole_hidden(self, hidden_t1H: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[T, H]`` for the head; backward sums the parts of the gradient that ranks compute."""
        group = self._world.tensor_group
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden_t1H, tensor_parallel_output_grad=True, group=group)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden_t1H, group=group)
        return self._world.context_ranks.gather(whole[:, 0])

    def forward(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        plan: AttentionPlan,
        segments: tuple[Segment, ...],
        head: Callable[[torch.Tensor, Unembed], R],
    ) -> R:
        """Run the whole model, which must be on one stage, and return ``head(hidden_TH, unembed)``."""
        assert self.unembed is not None
        hidden = self.hidden_states(input_ids_1T, position_ids_1T, plan, segments)
        return head(self.whole_hidden(hidden), self.unembed)
