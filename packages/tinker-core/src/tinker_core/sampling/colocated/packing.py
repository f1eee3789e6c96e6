"""One step as one packed forward: a token of every running sequence, and chunks of prompts.

Tokens are ordered by adapter, so that each adapter is one segment; inside an adapter by pool and slot, then prompts.

Shapes: T packed tokens, N rows whose logits are wanted, H query heads, h key-value heads, G = H / h, D head size,
n sequences of a pool, L the longest of them, c tokens of a prompt chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import attrs
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from tinker_core.sampling.colocated.cache import Pool, PromptCache
from tinker_core.training.adapters import AdapterWeights, Segment

O = TypeVar("O")  # noqa: E741 - an owner


@attrs.frozen(eq=False)
class DecodeToken(Generic[O]):
    """The newest token of a running sequence."""

    weights: AdapterWeights | None
    token: int
    position: int
    pool: Pool[O]
    slot: int


@attrs.frozen(eq=False)
class PromptChunk:
    """Some tokens of a prompt, starting at ``offset`` of it."""

    weights: AdapterWeights | None
    tokens: Sequence[int]
    offset: int
    cache: PromptCache

    @property
    def end(self) -> int:
        """Where the chunk ends in the prompt."""
        return self.offset + len(self.tokens)


Part = DecodeToken[O] | PromptChunk


@attrs.frozen(eq=False)
class Packed(Generic[O]):
    """The inputs of one forward."""

    parts: tuple[Part[O], ...]
    """In the order of their tokens."""
    starts: tuple[int, ...]
    """Where each part's tokens begin in T."""
    input_ids: torch.Tensor
    """int64 ``[1, T]``."""
    position_ids: torch.Tensor
    """int64 ``[1, T]``."""
    segments: tuple[Segment, ...]
    """Over T; empty when no token has an adapter."""
    row_segments: tuple[Segment, ...]
    """Over N."""
    rows: torch.Tensor | None
    """int64 ``[N]``: the last token of every part; None when that is every token."""
    plan: CachedPlan[O]


def pack(parts: Sequence[Part[O]], device: torch.device) -> Packed[O]:
    """Order the parts and lay out their tokens."""
    ordered = _by_adapter(parts)
    ids: list[int] = []
    positions: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    for part in ordered:
        starts.append(len(ids))
        if isinstance(part, PromptChunk):
            ids.extend(part.tokens)
            positions.extend(range(part.offset, part.end))
        else:
            ids.append(part.token)
            positions.append(part.position)
        ends.append(len(ids))
    only_decode = len(ids) == len(ordered)
    return Packed(
        parts=ordered,
        starts=tuple(starts),
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        segments=_segments(ordered, starts, ends),
        row_segments=_segments(ordered, range(len(ordered)), range(1, len(ordered) + 1)),
        rows=None if only_decode else torch.tensor(ends, device=device) - 1,
        plan=CachedPlan(ordered, starts, device),
    )


def _by_adapter(parts: Sequence[Part[O]]) -> tuple[Part[O], ...]:
    groups: dict[int, list[Part[O]]] = {}
    for part in parts:
        groups.setdefault(id(part.weights), []).append(part)
    return tuple(part for group in groups.values() for part in group)


def _segments(parts: Sequence[Part[O]], starts: Sequence[int], ends: Sequence[int]) -> tuple[Segment, ...]:
    if all(part.weights is None for part in parts):
        return ()
    segments: list[Segment] = []
    for part, start, end in zip(parts, starts, ends, strict=True):
        if segments and segments[-1].weights is part.weights:
            start = segments.pop().start
        segments.append(Segment(start=start, end=end, weights=part.weights))
    return tuple(segments)


@attrs.frozen(eq=False)
class _PoolStep(Generic[O]):
    """One pool's share of a forward."""

    pool: Pool[O]
    tokens: torch.Tensor | None
    """int64 ``[n]``: each slot's place in T; None when slot i is token i and there is nothing else."""
    targets: torch.Tensor
    """int64 ``[n]``: where each slot's new key goes in ``[S * C]``."""
    longest: int
    hidden: torch.Tensor | None
    """bool ``[n, 1, 1, L]``, true past a slot's end; None when all are equally long."""


class CachedPlan(Generic[O]):
    """An attention plan that reads and extends the caches of its parts. Good for one forward."""

    def __init__(self, parts: Sequence[Part[O]], starts: Sequence[int], device: torch.device) -> None:
        self._chunks: list[tuple[PromptChunk, int]] = []
        pools: dict[int, Pool[O]] = {}
        places: dict[int, dict[int, int]] = {}
        for part, start in zip(parts, starts, strict=True):
            if isinstance(part, PromptChunk):
                self._chunks.append((part, start))
            else:
                pools[part.pool.capacity] = part.pool
                places.setdefault(part.pool.capacity, {})[part.slot] = start
        alone = len(pools) == 1 and not self._chunks
        self._steps = [
            _pool_step(pool, [places[capacity][slot] for slot in range(len(pool.owners))], alone, device)
            for capacity, pool in pools.items()
        ]
        self._masks: dict[torch.dtype, list[torch.Tensor | None]] = {}
        self._chunk_masks = [_chunk_mask(chunk, device) for chunk, _ in self._chunks]

    def attend(
        self,
        layer_index: int,
        q_1HTD: torch.Tensor,
        k_1hTD: torch.Tensor,
        v_1hTD: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attention output ``[1, H, T, D]`` of every token to its own sequence so far."""
        q, k, v = q_1HTD[0].transpose(0, 1), k_1hTD[0].transpose(0, 1), v_1hTD[0].transpose(0, 1)
        masks = self._masks_in(q.dtype)
        if len(self._steps) == 1 and self._steps[0].tokens is None:
            out = _attend_pool(self._steps[0], masks[0], layer_index, q, k, v, scaling)
            return out.transpose(0, 1)[None]
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for step, mask in zip(self._steps, masks, strict=True):
            t = step.tokens
            out[t] = _attend_pool(step, mask, layer_index, q[t], k[t], v[t], scaling)
        for (chunk, start), hidden in zip(self._chunks, self._chunk_masks, strict=True):
            end = start + len(chunk.tokens)
            keys, values = chunk.cache.write(layer_index, chunk.offset, k[start:end], v[start:end])
            out[start:end] = _attend_chunk(q[start:end], keys, values, hidden, scaling)
        return out.transpose(0, 1)[None]

    def commit(self) -> None:
        """Count the tokens that the forward has added to the pools."""
        for step in self._steps:
            step.pool.lengths = [length + 1 for length in step.pool.lengths]

    def _masks_in(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        if dtype not in self._masks:
            self._masks[dtype] = [
                None
                if step.hidden is None
                else step.hidden.new_zeros(step.hidden.shape, dtype=dtype).masked_fill_(step.hidden, float("-inf"))
                for step in self._steps
            ]
        return self._masks[dtype]


def _pool_step(pool: Pool[O], places: list[int], alone: bool, device: torch.device) -> _PoolStep[O]:
    longest = max(pool.lengths) + 1
    if device.type == "cuda":
        longest = min(pool.capacity, -(-longest // 16) * 16)
    lengths = torch.tensor(pool.lengths, device=device)
    hidden = None
    if longest != min(pool.lengths) + 1:
        hidden = (torch.arange(longest, device=device) > lengths[:, None])[:, None, None]
    return _PoolStep(
        pool=pool,
        tokens=None if alone and places == list(range(len(places))) else torch.tensor(places, device=device),
        targets=torch.arange(len(places), device=device) * pool.capacity + lengths,
        longest=longest,
        hidden=hidden,
    )


def _attend_pool(
    step: _PoolStep[O],
    mask: torch.Tensor | None,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention ``[n, H, D]`` of one new token per slot; the query heads of a key head are rows, so nothing repeats."""
    keys, values = step.pool.layers[layer]
    keys.flatten(0, 1).index_copy_(0, step.targets, k)
    values.flatten(0, 1).index_copy_(0, step.targets, v)
    n, heads = q.shape[:2]
    grouped = q.reshape(n, keys.shape[2], heads // keys.shape[2], q.shape[2])
    out = F.scaled_dot_product_attention(
        grouped,
        keys[:n, : step.longest].transpose(1, 2),
        values[:n, : step.longest].transpose(1, 2),
        attn_mask=mask,
        scale=scaling,
    )
    return out.reshape(n, heads, -1)


def _chunk_mask(chunk: PromptChunk, device: torch.device) -> torch.Tensor | None:
    if chunk.offset == 0:
        return None
    columns = torch.arange(chunk.end, device=device)
    return columns <= torch.arange(chunk.offset, chunk.end, device=device)[:, None]


def _attend_chunk(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Causal attention ``[c, H, D]`` of a chunk to its prompt; key heads are the batch, shared by their group."""
    c, heads, size = q.shape
    groups = heads // keys.shape[1]
    q_hGcD = q.transpose(0, 1).reshape(keys.shape[1], groups, c, size)
    k_hGLD = keys.transpose(0, 1)[:, None].expand(-1, groups, -1, -1)
    v_hGLD = values.transpose(0, 1)[:, None].expand(-1, groups, -1, -1)
    out = F.scaled_dot_product_attention(q_hGcD, k_hGLD, v_hGLD, attn_mask=seen, is_causal=seen is None, scale=scaling)
    return out.reshape(heads, c, -1).transpose(0, 1)
