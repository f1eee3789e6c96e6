"""The fake trainer keeps the contract of a real one, in worker processes and without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.testing.trainer_contract import TrainerContract
from tinker_core.testing.trainer_lab import Arrays
from tinker_core.types import BaseModelSpec


@pytest.fixture(scope="module")
def group() -> Iterator[BlockingGroup]:
    spec = WorkerGroupSpec(
        base_model=BaseModelSpec(name="tiny", path="tiny"),
        trainer="fake",
        sampler=None,
        plugins=(FAKE_PLUGIN,),
        num_ranks=1,
        device="cpu",
        dtype="float32",
        max_models=5,
    )
    with start_group(spec) as group:
        yield group


class TestFakeTrainer(TrainerContract):
    def read_gradient(self, directory: Path) -> Arrays:
        return _read(directory / "gradient.npz")

    def read_weights(self, directory: Path) -> Arrays:
        return _read(directory / "weights.npz")


def _read(path: Path) -> Arrays:
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(zip("ab", (arrays[name] for name in arrays.files), strict=True))
