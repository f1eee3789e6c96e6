"""Short ways to drive the one model of a trainer of all parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinker_core.testing.trainer_lab import Arrays, TrainerLab, optimizer_steps, read_safetensors

FULL = {"full-parameter": True}
PARTS = ("model", "optimizer", "gradient")
"""Files of a checkpoint."""


class FullLab(TrainerLab):
    """Models of rank 0, and what their checkpoints hold."""

    def new(self) -> str:
        """The one model."""
        return self.create(rank=0)

    def anew(self, model_id: str) -> str:
        """Another model in place of one."""
        self.unload(model_id)
        return self.new()

    def state(self, model_id: str) -> Arrays:
        """Everything, by names that tell their file."""
        return read_state(self.snapshot(model_id, gradient=True))

    def gradient(self, model_id: str) -> Arrays:
        """What is accumulated; empty if nothing."""
        return read_safetensors(self.snapshot(model_id, gradient=True) / "gradient.safetensors")

    def weights(self, model_id: str) -> Arrays:
        """The float32 weights."""
        return read_safetensors(self.snapshot(model_id) / "model.safetensors")


def read_state(directory: Path) -> Arrays:
    found = {
        f"{part}: {name}": array
        for part in PARTS
        for name, array in read_safetensors(directory / f"{part}.safetensors").items()
    }
    return {**found, "steps": np.array(optimizer_steps(directory))}
