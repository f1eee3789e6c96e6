"""How the ranks of a world share one model: tensor, context, pipeline, expert and data parallel. Needs no torch.

A rank has two places: in the dense part (attention, embeddings) ranks run ``tp, cp, dp, pp``, fastest first; in the
expert part of a mixture-of-experts model they run ``ep, expert data, pp``.  Megatron-Core orders its groups so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import attrs

from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import Option, OptionValue

TENSOR = "tensor-parallel"
PIPELINE = "pipeline-parallel"
CONTEXT = "context-parallel"
EXPERT = "expert-parallel"
SEQUENCE = "sequence-parallel"
DISPATCHER = "expert-dispatcher"
DISPATCHERS = ("allgather", "alltoall")
"""How tokens come to the ranks of their experts: all of them to all ranks, or each to those that need it."""

TOPOLOGY_OPTIONS = (
    Option(name=TENSOR, type=int, default=1, help="ranks that share each layer's matrices"),
    Option(name=PIPELINE, type=int, default=1, help="ranks that hold consecutive layers"),
    Option(name=CONTEXT, type=int, default=1, help="ranks that share the tokens of each micro-batch"),
    Option(name=EXPERT, type=int, default=1, help="ranks that share the experts of each mixture-of-experts layer"),
    Option(
        name=SEQUENCE,
        type=bool,
        default=False,
        help="tensor-parallel ranks also share the tokens between the matrices; always so for mixtures of experts",
    ),
    Option(
        name=DISPATCHER,
        type=str,
        default=DISPATCHERS[0],
        help="how tokens come to the ranks of their experts: allgather, or alltoall, which moves less but needs CUDA",
    ),
)
"""The options that make a `Topology`."""


@attrs.frozen(kw_only=True)
class Place:
    """Where a rank is."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int
    expert_data: int


@attrs.frozen(kw_only=True)
class Topology:
    """The sizes of all parallel dimensions."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    expert_dispatcher: str = DISPATCHERS[0]

    @classmethod
    def from_options(cls, world_size: int, options: Mapping[str, OptionValue]) -> Self:
        """Raises `ConfigurationError` when the sizes do not make up the world."""
        sizes = {name: int(options.get(name, 1)) for name in (TENSOR, PIPELINE, CONTEXT, EXPERT)}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigurationError(f"--{name} must be at least 1, got {size}")
        dispatcher = str(options.get(DISPATCHER, DISPATCHERS[0]))
        if dispatcher not in DISPATCHERS:
            raise ConfigurationError(f"--{DISPATCHER} must be {' or '.join(DISPATCHERS)}, got {dispatcher!r}")
        sequence_parallel = bool(options.get(SEQUENCE, False))
        if sequence_parallel and sizes[TENSOR] == 1:
            raise ConfigurationError(f"--{SEQUENCE} needs --{TENSOR} of at least 2, whose ranks share the tokens")
        needed = smallest_world(options)
        if world_size % needed:
            raise ConfigurationError(
                f"{world_size} ranks cannot be divided: --{TENSOR} {sizes[TENSOR]}, --{PIPELINE} {sizes[PIPELINE]}, "
                f"--{CONTEXT} {sizes[CONTEXT]} and --{EXPERT} {sizes[EXPERT]} need a multiple of {needed}; "
                "set --num-ranks to one"
            )
        return cls(
            world_size=world_size,
            tensor=sizes[TENSOR],
            pipeline=sizes[PIPELINE],
            context=sizes[CONTEXT],
            expert=sizes[EXPERT],
            sequence_parallel=sequence_parallel,
            expert_dispatcher=dispatcher,
        )

    @property
    def data(self) -> int:
        """Ranks that compute different data with the same dense weights."""
        return self.world_size // (self.tensor * self.context * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // (self.expert * self.pipeline)

    @property
    def token_divisor(self) -> int:
        """What the tokens of a micro-batch must be a multiple of, so that ranks can share them evenly."""
        # Context-parallel ranks have a chunk of the front and one of the back each.
        chunks = 2 * self.context if self.context > 1 else 1
        return chunks * (self.tensor if self.sequence_parallel else 1)

    def place(self, rank: int) -> Place:
        """Where a rank is."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        expert_rest, expert = divmod(rank, self.expert)
        return Place(
            tensor=tensor,
            context=context,
            data=data,
            pipeline=pipeline,
            expert=expert,
            expert_data=expert_rest % self.expert_data,
        )

    def layers_of(self, pipeline: int, num_layers: int) -> range:
        """The layers of a stage, counted from 0."""
        each = num_layers // self.pipeline
        return range(pipeline * each, (pipeline + 1) * each)


def smallest_world(options: Mapping[str, OptionValue]) -> int:
    """The fewest ranks that the options need."""
    tensor, pipeline, context, expert = (int(options.get(name, 1)) for name in (TENSOR, PIPELINE, CONTEXT, EXPERT))
    dense = tensor * context
    together = dense
    while together % expert:
        together += dense
    return together * pipeline


def check_handle(options: Mapping[str, OptionValue]) -> None:
    """Raise `ConfigurationError` when no sampler can run inside the ranks."""
    stages = int(options.get(PIPELINE, 1))
    if stages > 1:
        raise ConfigurationError(
            f"--{PIPELINE} {stages} leaves no rank with all layers, so that no sampler can run inside the ranks; use "
            f"--sampler vllm, which has processes of its own, or --sampler none, or share the model by --{TENSOR}"
        )


def choose_ranks(asked: int, options: Mapping[str, OptionValue]) -> int:
    """The ranks of a world; 1, the default of ``--num-ranks``, means the fewest. Raises `ConfigurationError`."""
    ranks = smallest_world(options) if asked == 1 else asked
    return Topology.from_options(ranks, options).world_size
