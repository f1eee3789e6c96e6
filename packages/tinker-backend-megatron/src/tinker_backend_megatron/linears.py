"""Megatron-Core's parallel linears with LoRA between their collectives.

The update is added where the base product is a part of something that is summed or split anyway: to the split output
of a column-parallel linear, and to the partial output of a row-parallel one.  So adapters cost no collective of their
own, forward or backward; what tensor-parallel ranks share of the gradient is summed once per pass.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from tinker_backend_megatron.context import PassContext
from tinker_core.training.lora import LoraPart, multi_lora_linear


class LoraColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """A linear whose output features are split over tensor-parallel ranks."""

    pass_context: PassContext
    parts: tuple[LoraPart, ...] = ()

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rank's features, and the bias if it is to be added later."""
        assert weight is None
        assert not runtime_gather_output
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        bias = None if self.skip_bias_add else self.bias
        context = self.pass_context
        y = multi_lora_linear(x, self.weight, bias, self.parts, context.segments, context.tag)
        return y, self.bias if self.skip_bias_add else None


class LoraRowLinear(RowParallelLinear):  # type: ignore[misc]
    """A linear whose input features are split over tensor-parallel ranks."""

    pass_context: PassContext
    parts: tuple[LoraPart, ...] = ()

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All features (of the rank's tokens, with sequence parallelism), and the bias if it is to be added later."""
        assert self.bias is None
        context = self.pass_context
        y = multi_lora_linear(input_, self.weight, None, self.parts, context.segments, context.tag)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(y, group=self.tp_group), None
