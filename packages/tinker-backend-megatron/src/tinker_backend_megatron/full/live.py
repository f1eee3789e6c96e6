"""The parameters of a rank's root, as views of one row in compute type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinker_backend_megatron.full.layout import FullLayout
from tinker_backend_megatron.loading import LoadedModel


class LiveWeights:
    """What passes compute with: the tenant's weights, or the base model's own while there is no tenant."""

    def __init__(self, loaded: LoadedModel, layout: FullLayout, device: torch.device) -> None:
        self.layout = layout
        self.row = torch.zeros(layout.size, dtype=loaded.dtype, device=device)
        """In compute type. Passes read it; it changes only between them."""
        self.is_base = True
        """Whether these are the base model's own weights."""
        self._parameters = dict(loaded.root.named_parameters())
        for name, view in layout.named(self.row):
            view.copy_(self._parameters[name].detach())
            self._parameters[name].data = view

    def hold(self, row: torch.Tensor) -> None:
        """Take over a tenant's weights ``[size]``."""
        self.is_base = False
        self.row.copy_(row)

    def restore_base(self) -> None:
        """Read the base model's own weights again, bit for bit as they were; a collective. Raises `StorageError`."""
        if not self.is_base:
            self.layout.read_base(self.row)
            self.is_base = True

    @contextmanager
    def replaced(self, row: torch.Tensor) -> Iterator[None]:
        """Forwards inside the block, without autograd, compute with other weights, in a row of the same layout.

        No pass may be between its forward and its backward. On a GPU a row from host memory is copied for the block.
        """
        self._show(row.to(self.row.device))
        try:
            yield
        finally:
            self._show(self.row)

    def _show(self, row: torch.Tensor) -> None:
        for name, view in self.layout.named(row):
            self._parameters[name].data = view
