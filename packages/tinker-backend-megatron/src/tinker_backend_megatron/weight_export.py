"""Puts whole Hugging Face tensors together in rank 0, one after the other, from what all ranks hold of them.

Any values in the layout of the parameters can be exported so: weights in compute type, float32 masters, moments of an
optimizer, gradients.  `tinker_core.training.weight_files.save_tensors` writes what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist

from tinker_backend_megatron.mapping import ModelMap, Piece
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.errors import CheckpointMismatchError


@attrs.frozen(kw_only=True)
class Offer:
    """A range of a Hugging Face tensor that a rank holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    start: int
    stop: int

    @property
    def where(self) -> tuple[slice, ...]:
        """Where it lies in the whole tensor."""
        return (slice(None),) * self.axis + (slice(self.start, self.stop),)

    def room(self, *, whole: bool) -> torch.Tensor:
        """Memory for it, or for the whole tensor."""
        shape = list(self.shape)
        if not whole:
            shape[self.axis] = self.stop - self.start
        return torch.empty(shape, dtype=getattr(torch, self.dtype))


def export_weights(
    parameters: Iterable[tuple[str, torch.Tensor]],
    model_map: ModelMap,
    world: MegatronWorld,
    *,
    prefix: str = "",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(prefix + Hugging Face name, whole tensor on the CPU)`` in rank 0, and nothing in the others.

    A collective: every rank iterates it to the end, also when rank 0 has no more use for it.  ``parameters`` are this
    rank's, by their names in its root (as of ``root.named_parameters()``), with tensors of the parameters' shapes on
    any device and of any type; all ranks of a parameter must have the same type.  No rank holds more than one whole
    tensor at a time.  Tensors come in the order of rank 0's parameters, then those of the other ranks.

    Raises `CheckpointMismatchError` in all ranks when the ranks together do not hold all of a tensor.
    """
    held = _pieces(parameters, model_map, world)
    mine = [_offer(piece, tensor) for piece, tensor in held]
    plan = _plan(_exchange(mine, world))
    places = {offer: place for place, offer in reversed(list(enumerate(mine)))}
    for offers in plan:
        if world.rank == 0:
            yield prefix + offers[0][1].name, _assemble(offers, places, held)
            continue
        for rank, offer in offers:
            if rank == world.rank:
                dist.send(_take(held[places[offer]]), dst=0)


def _pieces(
    parameters: Iterable[tuple[str, torch.Tensor]], model_map: ModelMap, world: MegatronWorld
) -> list[tuple[Piece, torch.Tensor]]:
    """What this rank holds, without the padding of a vocabulary."""
    first_layer = model_map.topology.layers_of(world.place.pipeline, model_map.architecture.num_layers).start
    return [
        (piece, tensor.detach())
        for name, tensor in parameters
        for piece in model_map.pieces(name, first_layer, world.place)
        if piece.stop > piece.start
    ]


def _offer(piece: Piece, tensor: torch.Tensor) -> Offer:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Offer(name=piece.name, dtype=dtype, shape=piece.shape, axis=piece.axis, start=piece.start, stop=piece.stop)


def _exchange(mine: list[Offer], world: MegatronWorld) -> list[list[Offer]]:
    """Every rank's offers, in every rank."""
    if world.size == 1:
        return [mine]
    text = json.dumps([attrs.astuple(offer) for offer in mine]).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(text)]))
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
    texts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(texts, padded)
    return [[_read_offer(one) for one in json.loads(bytes(found.numpy()))] for found in texts]


def _read_offer(values: list[Any]) -> Offer:
    name, dtype, shape, axis, start, stop = values
    return Offer(name=name, dtype=dtype, shape=tuple(shape), axis=axis, start=start, stop=stop)


def _plan(offers_of: Sequence[Sequence[Offer]]) -> list[list[tuple[int, Offer]]]:
    """For each tensor the ranges it is made of, in order, each with the lowest rank that has it."""
    found: dict[str, dict[tuple[int, int], tuple[int, Offer]]] = {}
    for rank, offers in enumerate(offers_of):
        for offer in offers:
            found.setdefault(offer.name, {}).setdefault((offer.start, offer.stop), (rank, offer))
    plan = [[ranges[bounds] for bounds in sorted(ranges)] for ranges in found.values()]
    for one in plan:
        _check_covered([offer for _, offer in one])
    return plan


def _check_covered(offers: list[Offer]) -> None:
    at, first = 0, offers[0]
    for offer in offers:
        if offer.start != at or (offer.dtype, offer.shape, offer.axis) != (first.dtype, first.shape, first.axis):
            break
        at = offer.stop
    if at != first.shape[first.axis]:
        raise CheckpointMismatchError(
            f"the ranks hold {[(offer.start, offer.stop) for offer in offers]} of axis {first.axis} of {first.name!r} "
            f"{list(first.shape)}, not all of it once and in one type"
        )


def _take(held: tuple[Piece, torch.Tensor]) -> torch.Tensor:
    piece, tensor = held
    return piece.take(tensor).cpu()


def _assemble(
    offers: list[tuple[int, Offer]],
    places: dict[Offer, int],
    held: list[tuple[Piece, torch.Tensor]],
) -> torch.Tensor:
    if len(offers) == 1 and offers[0][0] == 0:
        return _take(held[places[offers[0][1]]])
    whole = offers[0][1].room(whole=True)
    for rank, offer in offers:
        target = whole[offer.where]
        if rank == 0:
            target.copy_(_take(held[places[offer]]))
            continue
        received = target if target.is_contiguous() else offer.room(whole=False)
        dist.recv(received, src=rank)
        if received is not target:
            target.copy_(received)
    return whole
