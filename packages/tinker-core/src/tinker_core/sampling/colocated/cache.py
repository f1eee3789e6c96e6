"""Keys and values of sequences in progress.

A prompt is computed into a `PromptCache` of its own.  Running sequences live in pools: all sequences of a pool have
room for the same number of tokens, and lie in slots 0..n-1 without holes, so that one attention call serves a whole
pool.  A sequence that outgrows its pool moves to the next, of twice the size: the room it holds is at most twice what
it uses, and every token is moved a constant number of times.

Shapes: h key-value heads, D head size, C capacity of a pool, S its slots.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

SMALLEST_CAPACITY = 256
"""Tokens a slot of the first pool holds."""

O = TypeVar("O")  # noqa: E741 - an owner
Layers = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values by layer."""


class PromptCache:
    """Keys and values of one prompt, each ``[length, h, D]`` per layer, filled chunk by chunk."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.layers: Layers = {}

    def write(
        self, layer: int, offset: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the next chunk ``[c, h, D]`` of one layer; returns everything up to its end, ``[offset + c, h, D]``."""
        if layer not in self.layers:
            self.layers[layer] = (
                keys.new_empty(self.length, *keys.shape[1:]),
                values.new_empty(self.length, *values.shape[1:]),
            )
        end = offset + keys.shape[0]
        all_keys, all_values = self.layers[layer]
        all_keys[offset:end] = keys
        all_values[offset:end] = values
        return all_keys[:end], all_values[:end]


class Pool(Generic[O]):
    """Slots of equal capacity; keys and values are ``[S, C, h, D]`` per layer."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.owners: list[O] = []
        """Who holds slot 0, 1, …"""
        self.lengths: list[int] = []
        """Tokens stored per slot."""
        self.layers: Layers = {}
        self._slots = 0

    def add(self, owner: O, source: Layers, start: int, length: int) -> None:
        """Give the next slot to ``owner``, filled from ``length`` tokens at ``start`` of flat ``[tokens, h, D]``."""
        slot = len(self.owners)
        if slot == self._slots:
            self._resize(max(1, 2 * self._slots), source)
        for layer, (keys, values) in self.layers.items():
            source_keys, source_values = source[layer]
            keys[slot, :length] = source_keys[start : start + length]
            values[slot, :length] = source_values[start : start + length]
        self.owners.append(owner)
        self.lengths.append(length)

    def flat(self) -> Layers:
        """Views ``[S * C, h, D]`` of everything."""
        return {layer: (keys.flatten(0, 1), values.flatten(0, 1)) for layer, (keys, values) in self.layers.items()}

    def remove(self, slot: int, *, wipe: bool) -> None:
        """Free a slot; the last slot's owner moves into it. ``wipe`` clears values that could poison later owners."""
        last = len(self.owners) - 1
        if wipe:
            # Masked positions are multiplied by zero, which does not hide what is not finite.
            for keys, values in self.layers.values():
                keys[slot].zero_()
                values[slot].zero_()
        if slot != last:
            length = self.lengths[last]
            for keys, values in self.layers.values():
                keys[slot, :length] = keys[last, :length]
                values[slot, :length] = values[last, :length]
            self.owners[slot] = self.owners[last]
            self.lengths[slot] = self.lengths[last]
        self.owners.pop()
        self.lengths.pop()
        if 4 * last <= self._slots:
            self._resize(2 * last, self.layers)

    def _resize(self, slots: int, like: Layers) -> None:
        used = len(self.owners)
        if slots == 0:
            self.layers, self._slots = {}, 0
            return

        def resized(layer: int, index: int) -> torch.Tensor:
            sample = like[layer][index]
            tensor = sample.new_zeros(slots, self.capacity, *sample.shape[-2:])
            if layer in self.layers:
                tensor[:used] = self.layers[layer][index][:used]
            return tensor

        self.layers = {layer: (resized(layer, 0), resized(layer, 1)) for layer in like}
        self._slots = slots


class SequenceCache(Generic[O]):
    """All pools, by capacity."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._pools: dict[int, Pool[O]] = {}

    @property
    def pools(self) -> list[Pool[O]]:
        """Pools in use, smallest capacity first."""
        return [self._pools[capacity] for capacity in sorted(self._pools)]

    def __len__(self) -> int:
        return sum(len(pool.owners) for pool in self._pools.values())

    def add(self, owner: O, prompt: PromptCache) -> None:
        """Start a sequence with a copy of its prompt."""
        self._pool_for(prompt.length + 1).add(owner, prompt.layers, 0, prompt.length)

    def remove(self, owner: O, *, wipe: bool = False) -> None:
        """Drop a sequence."""
        for pool in self.pools:
            for slot, other in enumerate(pool.owners):
                if other is owner:
                    pool.remove(slot, wipe=wipe)
                    self._drop_empty(pool)
                    return
        raise LookupError("the sequence holds no slot")

    def make_room(self) -> None:
        """Move every sequence that has no room for one more token to a larger pool."""
        for pool in self.pools:
            for slot in reversed(range(len(pool.owners))):
                length = pool.lengths[slot]
                if length == pool.capacity:
                    self._pool_for(length + 1).add(pool.owners[slot], pool.flat(), slot * pool.capacity, length)
                    pool.remove(slot, wipe=False)
            self._drop_empty(pool)

    def _pool_for(self, length: int) -> Pool[O]:
        capacity = SMALLEST_CAPACITY
        while capacity < length:
            capacity *= 2
        capacity = min(capacity, self._max_length)
        return self._pools.setdefault(capacity, Pool(capacity))

    def _drop_empty(self, pool: Pool[O]) -> None:
        if not pool.owners:
            del self._pools[pool.capacity]
