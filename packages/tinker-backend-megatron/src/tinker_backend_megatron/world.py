"""The ranks of a Megatron-Core world and their groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from tinker_backend_megatron.context_parallel import ContextRanks
from tinker_backend_megatron.topology import Topology
from tinker_core.training.world import World, choose_device

if TYPE_CHECKING:
    from tinker_backend_megatron.rows import ShardedLayout
    from tinker_core.interfaces import RankContext
    from tinker_core.training.adapters import AdapterGradient


class MegatronWorld(World):
    """One process group for everything and those of Megatron-Core; also a world of one rank has them."""

    def __init__(self, context: RankContext, topology: Topology) -> None:
        self.rank = context.rank
        self.size = context.world_size
        self.device = choose_device(context)
        self.topology = topology
        self.place = topology.place(self.rank)
        # Host memory goes over gloo also where devices have NCCL.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            init_method=context.rendezvous,
            rank=self.rank,
            world_size=self.size,
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tensor,
            pipeline_model_parallel_size=topology.pipeline,
            context_parallel_size=topology.context,
            expert_model_parallel_size=topology.expert,
            expert_tensor_parallel_size=1,
        )
        # The tracker that never forks: nothing here draws random numbers on a device.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        self._check_place()
        self.context_ranks = ContextRanks(
            rank=self.place.context, size=topology.context, group=parallel_state.get_context_parallel_group()
        )
        """The ranks that share the tokens of this rank's micro-batches."""

    def _check_place(self) -> None:
        place = self.place
        theirs = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_data_parallel_rank(),
        )
        ours = (place.tensor, place.context, place.data, place.pipeline, place.expert, place.expert_data)
        if theirs != ours:
            raise RuntimeError(f"Megatron-Core places rank {self.rank} at {theirs}, this backend at {ours}")

    @property
    def data_rank(self) -> int:
        """Which of each micro-pass's bins this rank computes, together with its model-parallel peers."""
        return self.place.data

    @property
    def num_data_ranks(self) -> int:
        """Bins of a micro-pass."""
        return self.topology.data

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.place.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return self.place.pipeline == self.topology.pipeline - 1

    @property
    def reports(self) -> bool:
        """Whether this rank, among those that find the same losses and logprobs, is the one that reports them."""
        return self.is_last_stage and self.place.tensor == 0

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's matrices."""
        found: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        return found

    def gather_tensor_parallel(self, values: torch.Tensor) -> torch.Tensor:
        """``[m]`` of every tensor-parallel rank as ``[ranks, m]``, without autograd."""
        found = values.new_empty(self.topology.tensor, *values.shape)
        dist.all_gather(list(found), values.contiguous(), group=self.tensor_group)
        return found

    def sum_gradient(self, gradient: AdapterGradient) -> None:
        """Add up each part of a row over the ranks that hold it."""
        layout: ShardedLayout = gradient.layout  # type: ignore[assignment]
        shared, own, expert = layout.parts(gradient.row)
        if self.size == 1:
            return
        if shared.numel():
            dist.all_reduce(shared, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        if own.numel():
            dist.all_reduce(own, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if expert.numel():
            dist.all_reduce(expert, group=parallel_state.get_expert_data_parallel_group())

    def all_true(self, flags: Sequence[bool]) -> list[bool]:
        """Which of some flags are true in all ranks."""
        if self.size == 1 or not flags:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return [bool(one) for one in found.tolist()]

    def close(self) -> None:
        """Leave the process groups."""
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
