"""Whose the rows are that a dispatcher brings to a rank's experts, some of them from other ranks.

An owner is an index into `PassContext.tenants`, which is the same in all ranks; -1 owns padding.

Shapes: t tokens of this rank, R rows of its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)

from tinker_backend_megatron.context import PassContext
from tinker_core.training.adapters import Segment

NOBODY = -1


def owners_of_rows(dispatcher: MoETokenDispatcher, context: PassContext) -> torch.Tensor:
    """The owner of each row that was dispatched last, int64 ``[R]``; a collective of the expert-parallel group."""
    if isinstance(dispatcher, MoEAllGatherTokenDispatcher):
        if context.token_owners is None:
            context.token_owners = _gather(_owners_of_tokens(dispatcher, context), dispatcher.tp_ep_group)
        return context.token_owners[dispatcher.reversed_local_input_permutation_mapping]
    assert isinstance(dispatcher, MoEAlltoAllTokenDispatcher)
    if context.token_owners is None:
        context.token_owners = _owners_of_tokens(dispatcher, context)
    return _send_to_experts(dispatcher, context.token_owners[dispatcher.reversed_local_input_permutation_mapping])


def _owners_of_tokens(dispatcher: MoETokenDispatcher, context: PassContext) -> torch.Tensor:
    """int64 ``[t]``."""
    count = dispatcher.hidden_shape[0]
    parts = parallel_state.get_tensor_model_parallel_world_size() if dispatcher.config.sequence_parallel else 1
    owners = torch.full((count * parts,), NOBODY, dtype=torch.int64)
    for index, segment in enumerate(context.segments):
        owners[segment.start : segment.end] = context.owner(index)
    first = count * parallel_state.get_tensor_model_parallel_rank() if parts > 1 else 0
    device = torch.device("cpu") if dispatcher.config.use_cpu_initialization else torch.cuda.current_device()
    return owners[first : first + count].to(device)


def _gather(owners: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() == 1:
        return owners
    found = owners.new_empty(group.size(), owners.numel())
    dist.all_gather(list(found), owners, group=group)
    return found.flatten()


def _send_to_experts(dispatcher: MoEAlltoAllTokenDispatcher, owners: torch.Tensor) -> torch.Tensor:
    """Send owners the way that their tokens went."""
    if dispatcher.ep_size > 1:
        sent, received = _sizes(dispatcher.input_splits), _sizes(dispatcher.output_splits)
        found = owners.new_empty(sum(received))
        dist.all_to_all_single(found, owners, received, sent, group=dispatcher.ep_group)
        owners = found
    if dispatcher.num_local_experts > 1:
        owners, _ = sort_chunks_by_idxs(
            owners, dispatcher.num_global_tokens_per_local_expert.ravel(), dispatcher.sort_input_by_local_experts
        )
    return owners


def _sizes(splits: Any) -> list[int]:  # noqa: ANN401 - Megatron-Core's are arrays of numpy
    return [int(size) for size in splits]


def row_segments(
    owners_R: torch.Tensor, counts: Sequence[int], tenants: Sequence[Segment]
) -> list[tuple[Segment, ...]]:
    """For each of a rank's experts, which have ``counts`` rows each, the runs of rows with an adapter."""
    device = torch.device("cpu")
    experts = torch.repeat_interleave(torch.arange(len(counts), device=device), torch.tensor(counts, device=device))
    # Runs end where the expert or the owner changes.
    keys = experts * (len(tenants) + 1) + (owners_R.to(device) - NOBODY)
    found, lengths = torch.unique_consecutive(keys, return_counts=True)
    segments: list[list[Segment]] = [[] for _ in counts]
    at, before = 0, -1
    for key, length in zip(found.tolist(), lengths.tolist(), strict=True):
        expert, place = divmod(key, len(tenants) + 1)
        at = at if expert == before else 0
        owner = place + NOBODY
        if owner != NOBODY and tenants[owner].weights is not None:
            tenant = tenants[owner]
            segments[expert].append(
                Segment(start=at, end=at + length, weights=tenant.weights, gradient=tenant.gradient, owner=owner)
            )
        at, before = at + length, expert
    return [tuple(one) for one in segments]
