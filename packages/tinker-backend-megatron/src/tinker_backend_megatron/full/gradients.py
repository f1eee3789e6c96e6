"""Takes the gradients of parameters out of autograd, into the row of the request that they belong to.

A parameter's gradient is added to the row, in float32, as soon as autograd has it, and dropped: only one of them exists
at a time, and micro-batches add up in float32 whatever the parameters' type.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from tinker_backend_megatron.full.layout import FullLayout
from tinker_backend_megatron.root import MegatronRoot
from tinker_core.training.micro_batch import PassLayout
from tinker_core.training.passes import PackedModel, PassTally

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class GradientCollector:
    """Hooks on all parameters of a root, which thereby require gradients."""

    def __init__(self, root: MegatronRoot, layout: FullLayout, padding: int | None) -> None:
        """``padding``: a token whose embedding learns nothing as an input, as in Hugging Face models that have one."""
        self.layout = layout
        self._root = root
        self._padding = self._row_of(padding)
        self._views: dict[str, torch.Tensor] = {}
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def _row_of(self, token: int | None) -> int | None:
        """The row of a token in this rank's part of the embedding, if it has it."""
        tokens = self._root.tokens
        return token - tokens.start if token is not None and tokens.start <= token < tokens.end else None

    def _take(self, name: str, parameter: torch.Tensor) -> None:
        """Add a gradient that autograd has found to the row that receives, if any."""
        if name in self._views and parameter.grad is not None:
            if name == _EMBEDDING and self._padding is not None:
                parameter.grad[self._padding] = 0
            self._views[name].add_(parameter.grad)
        parameter.grad = None

    @contextmanager
    def receiving(self, row: torch.Tensor) -> Iterator[None]:
        """Backward passes inside the block add to a float32 row, and so does the loss head."""
        self._views = dict(self.layout.named(row))
        unembed = self._root.unembed
        if unembed is not None:
            unembed.weight_gradient = self._head_gradient()[: unembed.weight.shape[0]]
        try:
            yield
        finally:
            self._views = {}
            if unembed is not None:
                unembed.weight_gradient = None
            for parameter in self._root.parameters():
                parameter.grad = None

    def _head_gradient(self) -> torch.Tensor:
        """Of the output projection, which is the embedding itself where both are on one stage and tied."""
        return self._views[_OUTPUT if _OUTPUT in self._views else _EMBEDDING]


class FullPackedModel:
    """Implements `tinker_core.training.passes.PackedModel`; a pass is of one request."""

    def __init__(self, model: PackedModel, collector: GradientCollector) -> None:
        self._model, self._collector = model, collector

    def run(self, layout: PassLayout, tally: PassTally) -> Generator[None, None, None]:
        """Run the micro-batches; their gradients go to the request's row."""
        (gradient,) = tally.gradients
        if gradient is None:
            yield from self._model.run(layout, tally)
            return
        with self._collector.receiving(gradient.row):
            yield from self._model.run(layout, tally)
        self._collector.layout.join_tied(gradient.row)
