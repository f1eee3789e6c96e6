"""Drawing tokens: whole batches at once, each row by its own rule and its own random number.

A draw needs one uniform number (`tinker_core.sampling.numbers`), which picks a token by inverting the cumulative
distribution.

Shapes: N rows, V vocabulary, K numbers per row, B tokens per block.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from tinker_core.types import SamplingParams

BLOCK = 128
"""Tokens per block of the two-level search; divides the vocabularies of most models, others are padded."""
NUCLEUS_GUESS = 1024
"""Candidates that are sorted first for top_p; a flatter distribution is sorted whole."""
_BELOW_ONE = 1.0 - 2.0**-50


@attrs.frozen(eq=False)
class Drawn:
    """What one step drew."""

    tokens: torch.Tensor
    """int64 ``[N]``; -1 where the model's logits are not finite."""
    logprobs: torch.Tensor
    """float32 ``[N]``: the model's own, before temperature, top-k and top-p."""
    log_totals: torch.Tensor
    """float32 ``[N]``: logsumexp of the logits."""


def draw(logits: torch.Tensor, rules: Sequence[SamplingParams], numbers: npt.NDArray[np.float64]) -> Drawn:
    """Draw one token per row of float32 logits ``[N, V]``; ``numbers`` ``[N]`` are uniform in [0, 1)."""
    greatest = logits.amax(-1, keepdim=True)
    shifted = logits - greatest
    mass = shifted.exp()
    log_totals = mass.sum(-1).log_() + greatest[:, 0]
    random = torch.from_numpy(numbers).to(logits.device)
    kinds = [_kind(rule) for rule in rules]
    if all(kind == "model" for kind in kinds):
        tokens = invert(mass, random[:, None])[:, 0]
    else:
        tokens = torch.empty(len(rules), dtype=torch.int64, device=logits.device)
        for kind in dict.fromkeys(kinds):
            chosen = [row for row, other in enumerate(kinds) if other == kind]
            rows = torch.tensor(chosen, device=logits.device)
            tokens[rows] = _draw_kind(kind, shifted[rows], mass[rows], [rules[row] for row in chosen], random[rows])
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - log_totals
    tokens = tokens.masked_fill(~logprobs.isfinite(), -1)
    return Drawn(tokens=tokens, logprobs=logprobs, log_totals=log_totals)


def _kind(rule: SamplingParams) -> str:
    if rule.temperature == 0.0 or rule.top_k == 1:
        return "greedy"
    if rule.top_k > 0 or rule.top_p < 1.0:
        return "restricted"
    return "model" if rule.temperature == 1.0 else "tempered"


def _draw_kind(
    kind: str, shifted: torch.Tensor, mass: torch.Tensor, rules: Sequence[SamplingParams], random: torch.Tensor
) -> torch.Tensor:
    if kind == "greedy":
        return shifted.argmax(-1)
    if kind == "model":
        return invert(mass, random[:, None])[:, 0]
    temperatures = torch.tensor([rule.temperature for rule in rules], dtype=torch.float32, device=shifted.device)
    scaled = shifted / temperatures[:, None]
    if kind == "tempered":
        return invert(scaled.exp_(), random[:, None])[:, 0]
    return _draw_restricted(scaled, rules, random)


def invert(mass: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Tokens int64 ``[N, K]`` at float64 quantiles ``[N, K]`` of distributions proportional to ``mass`` ``[N, V]``.

    A token without mass is never chosen.  First the block, then the token in it: one pass over the vocabulary.
    """
    size = mass.shape[1]
    if size % BLOCK:
        mass = F.pad(mass, (0, BLOCK - size % BLOCK))
    blocks_NnB = mass.view(mass.shape[0], -1, BLOCK)
    ends = blocks_NnB.sum(-1).double().cumsum(-1)
    aim = random * ends[:, -1:]
    block = _first_above(ends, aim)
    aim = aim - torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0.0)
    rows = torch.arange(mass.shape[0], device=mass.device)[:, None]
    inner_NKB = blocks_NnB[rows, block].double().cumsum(-1)
    tokens = block * BLOCK + _first_above(inner_NKB, aim[..., None])[..., 0]
    # Only mass that is not a number can lead into the padding; whoever draws from it finds out by its logprob.
    return tokens.clamp_max_(size - 1)


def _first_above(ends: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    # Rounding may lift an aim to the very end, where nothing lies above it.
    aim = torch.minimum(aim, ends[..., -1:] * _BELOW_ONE)
    return torch.searchsorted(ends, aim.contiguous(), right=True).clamp_max_(ends.shape[-1] - 1)


def _draw_restricted(scaled: torch.Tensor, rules: Sequence[SamplingParams], random: torch.Tensor) -> torch.Tensor:
    size = scaled.shape[1]
    limits = [min(rule.top_k, size) if rule.top_k > 0 else size for rule in rules]
    width = min(size, max(limits), NUCLEUS_GUESS if max(limits) == size else size)
    tokens, complete = _draw_sorted(scaled, rules, limits, random, width)
    if width < size and not complete.all():
        left = (~complete).nonzero()[:, 0]
        kept = left.tolist()
        tokens[left], _ = _draw_sorted(
            scaled[left], [rules[row] for row in kept], [limits[row] for row in kept], random[left], size
        )
    return tokens


def _draw_sorted(
    scaled: torch.Tensor, rules: Sequence[SamplingParams], limits: Sequence[int], random: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[N]`` from the ``width`` likeliest, and whether those are all that each row's rule allows ``[N]``."""
    device = scaled.device
    limit = torch.tensor(limits, device=device)[:, None]
    top_p = torch.tensor([rule.top_p for rule in rules], dtype=torch.float64, device=device)[:, None]
    values, order = scaled.topk(width, dim=-1)
    mass = values.double().exp_().masked_fill_(torch.arange(width, device=device) >= limit, 0.0)
    ends = mass.cumsum(-1)
    whole = scaled.double().exp_().sum(-1, keepdim=True)
    total = torch.where(limit < scaled.shape[1], ends[:, -1:], whole)
    complete = (limit <= width) | ((top_p < 1.0) & (ends[:, -1:] >= top_p * total))
    kept = mass.masked_fill_((ends - mass >= top_p * total) & (top_p < 1.0), 0.0)
    kept_ends = kept.cumsum(-1)
    place = _first_above(kept_ends, random[:, None] * kept_ends[:, -1:])
    return order.gather(1, place)[:, 0], complete[:, 0]
