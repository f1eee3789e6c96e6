"""The model as a colocated sampler calls it: any number of tokens, and every rank has the logits of all of them.

Ranks get the same calls. Those that share layers' matrices compute their heads, with a cache of those alone; those that
share tokens or data in training compute the same here.

Shapes: T packed tokens, H query heads and h key-value heads of this rank, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import nn

from tinker_backend_megatron.root import MegatronRoot, Unembed
from tinker_core.training.adapters import Segment
from tinker_core.training.attention import AttentionPlan

R = TypeVar("R")


class SamplingRoot(nn.Module):
    """Implements `tinker_core.sampling.colocated.root.Root` over a root that has the whole model on one stage."""

    def __init__(self, root: MegatronRoot, tensor_ranks: int) -> None:
        super().__init__()
        self._root = root
        self._divisor = tensor_ranks if root.config.sequence_parallel else 1

    @torch.no_grad()
    def forward(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        plan: AttentionPlan,
        segments: tuple[Segment, ...],
        head: Callable[[torch.Tensor, Unembed], R],
    ) -> R:
        """Run the layers and return ``head(hidden_TH, unembed)``."""
        root = self._root
        assert root.unembed is not None
        length = input_ids_1T.shape[1]
        padding = -length % self._divisor
        if padding:
            # Sequence parallelism cuts the tokens into equal parts. What fills them up is in no segment and no cache.
            input_ids_1T, position_ids_1T = F.pad(input_ids_1T, (0, padding)), F.pad(position_ids_1T, (0, padding))
            plan = _FilledPlan(plan, length, padding)
        hidden = root.hidden_states(input_ids_1T, position_ids_1T, plan, segments)
        if root.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=root.world.tensor_group)
        return head(hidden[:length, 0], root.unembed)


class _FilledPlan:
    """Attention of the first tokens by their own plan; the others attend to nothing."""

    def __init__(self, plan: AttentionPlan, length: int, padding: int) -> None:
        self._plan, self._length, self._padding = plan, length, padding

    def attend(
        self,
        layer_index: int,
        q_1HTD: torch.Tensor,
        k_1hTD: torch.Tensor,
        v_1hTD: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attention output ``[1, H, T, D]``, zero where a token only fills up."""
        q, k, v = (x[:, :, : self._length] for x in (q_1HTD, k_1hTD, v_1hTD))
        return F.pad(self._plan.attend(layer_index, q, k, v, scaling), (0, 0, 0, self._padding))
