"""Which tokens the logits of a rank are about: all of them, or a range when ranks share the output projection.

Shapes: n rows of a chunk, N target cells of it, v logits per row in this rank.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Vocabulary(Protocol):
    """The tokens of the logits that a rank computes. All ranks that share the vocabulary make the same calls."""

    @property
    def width(self) -> int:
        """v, padding included: the same in all ranks."""

    def normalize(
        self, logits_nv: torch.Tensor, rows_N: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-sum-exp ``[n]`` over the whole vocabulary, and each target's logit ``[N]``, the same bits in all."""

    def add_targets(
        self, grad_nv: torch.Tensor, rows_N: torch.Tensor, targets_N: torch.Tensor, slopes_N: torch.Tensor
    ) -> None:
        """Add slopes in place where this rank's logits are their targets'."""


class WholeVocabulary:
    """Every token's logit is here."""

    def __init__(self, size: int) -> None:
        self.width = size

    def normalize(
        self, logits_nv: torch.Tensor, rows_N: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-sum-exp and the targets' logits."""
        return torch.logsumexp(logits_nv, -1), logits_nv[rows_N, targets_N]

    def add_targets(
        self, grad_nv: torch.Tensor, rows_N: torch.Tensor, targets_N: torch.Tensor, slopes_N: torch.Tensor
    ) -> None:
        """Add slopes at the targets."""
        grad_nv.view(-1).index_add_(0, rows_N * grad_nv.shape[1] + targets_N, slopes_N)


class GatherAlong(Protocol):
    """Puts together what the ranks that share the vocabulary have found."""

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """``[m]`` of every rank as ``[ranks, m]``."""


class VocabularyShard:
    """Logits of the tokens ``start..end``; the other ranks of a group have the others."""

    def __init__(self, start: int, end: int, width: int, gather: GatherAlong) -> None:
        self._start, self._end = start, end
        self.width = width
        self._gather = gather

    def normalize(
        self, logits_nv: torch.Tensor, rows_N: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One exchange of a number per row and one per cell; no logits leave their rank."""
        mine, places = self._mine(targets_N)
        picked = torch.zeros(targets_N.shape, dtype=logits_nv.dtype, device=logits_nv.device)
        picked[mine] = logits_nv[rows_N[mine], places]
        found = self._gather(torch.cat([torch.logsumexp(logits_nv, -1), picked]))
        totals, targets = torch.split(found, [logits_nv.shape[0], targets_N.shape[0]], dim=1)
        return torch.logsumexp(totals, 0), targets.sum(0)

    def add_targets(
        self, grad_nv: torch.Tensor, rows_N: torch.Tensor, targets_N: torch.Tensor, slopes_N: torch.Tensor
    ) -> None:
        """Add slopes at the targets that are this rank's."""
        mine, places = self._mine(targets_N)
        grad_nv.view(-1).index_add_(0, rows_N[mine] * grad_nv.shape[1] + places, slopes_N[mine])

    def _mine(self, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mine = (targets_N >= self._start) & (targets_N < self._end)
        return mine, targets_N[mine] - self._start
