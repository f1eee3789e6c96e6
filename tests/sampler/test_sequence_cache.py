"""The key-value cache: what a sequence stored comes back wherever it has moved, and memory follows need."""

from __future__ import annotations

import torch

from tinker_core.sampling.colocated.cache import SMALLEST_CAPACITY, PromptCache, SequenceCache


def prompt(name: int, length: int) -> PromptCache:
    cache = PromptCache(length)
    for layer in range(2):
        keys = torch.arange(length * 6.0).view(length, 2, 3) + 1000.0 * name + 0.5 * layer
        cache.write(layer, 0, keys[:1], -keys[:1])
        cache.write(layer, 1, keys[1:], -keys[1:])
    return cache


def check(cache: SequenceCache[int], prompts: dict[int, PromptCache]) -> None:
    assert sorted(owner for pool in cache.pools for owner in pool.owners) == sorted(prompts)
    for pool in cache.pools:
        for slot, owner in enumerate(pool.owners):
            length = prompts[owner].length
            for layer, (keys, values) in pool.layers.items():
                expected_keys, expected_values = prompts[owner].layers[layer]
                torch.testing.assert_close(keys[slot, :length], expected_keys, rtol=0, atol=0)
                torch.testing.assert_close(values[slot, :length], expected_values, rtol=0, atol=0)


def test_sequences_keep_their_values_while_others_come_and_go() -> None:
    cache: SequenceCache[int] = SequenceCache(1000)
    prompts: dict[int, PromptCache] = {}
    for owner in range(9):
        prompts[owner] = prompt(owner, 3 + 40 * owner)
        cache.add(owner, prompts[owner])
    check(cache, prompts)
    assert [pool.capacity for pool in cache.pools] == [SMALLEST_CAPACITY, 2 * SMALLEST_CAPACITY]
    for owner in (0, 8, 3, 4, 1, 6):
        cache.remove(owner)
        del prompts[owner]
        check(cache, prompts)


def test_a_full_slot_moves_to_a_larger_pool() -> None:
    cache: SequenceCache[int] = SequenceCache(4 * SMALLEST_CAPACITY)
    prompts = {owner: prompt(owner, SMALLEST_CAPACITY - 1) for owner in range(3)}
    for owner, filled in prompts.items():
        cache.add(owner, filled)
    (pool,) = cache.pools
    pool.lengths[1] = SMALLEST_CAPACITY
    cache.make_room()
    assert [pool.capacity for pool in cache.pools] == [SMALLEST_CAPACITY, 2 * SMALLEST_CAPACITY]
    assert [sorted(pool.owners) for pool in cache.pools] == [[0, 2], [1]]
    check(cache, prompts)


def test_memory_is_released_as_sequences_end() -> None:
    cache: SequenceCache[int] = SequenceCache(1000)
    for owner in range(16):
        cache.add(owner, prompt(owner, 4))
    (pool,) = cache.pools
    assert pool.layers[0][0].shape[0] == 16
    for owner in range(14):
        cache.remove(owner)
    assert pool.layers[0][0].shape[0] <= 8
    cache.remove(14)
    cache.remove(15)
    assert cache.pools == []
    assert len(cache) == 0


def test_wiping_leaves_nothing_that_is_not_finite() -> None:
    cache: SequenceCache[int] = SequenceCache(1000)
    poisoned = prompt(0, 20)
    poisoned.layers[1][1].fill_(float("nan"))
    cache.add(0, poisoned)
    for owner in (1, 2):
        cache.add(owner, prompt(owner, 4))
    cache.remove(0, wipe=True)
    (pool,) = cache.pools
    assert all(bool(tensor.isfinite().all()) for pair in pool.layers.values() for tensor in pair)
