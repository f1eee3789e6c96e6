"""The fake trainer keeps the contract of a real one, in worker processes and without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np
import pytest

from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.determinism_contract import DeterminismContract
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.testing.trainer_contract import TrainerContract
from tinker_core.testing.trainer_lab import Arrays
from tinker_core.types import BaseModelSpec

SPEC = WorkerGroupSpec(
    base_model=BaseModelSpec(name="tiny", path="tiny"),
    trainer="fake",
    sampler=None,
    plugins=(FAKE_PLUGIN,),
    num_ranks=1,
    device="cpu",
    dtype="float32",
    max_models=5,
)


@pytest.fixture(scope="module")
def group() -> Iterator[BlockingGroup]:
    with start_group(SPEC) as group:
        yield group


@pytest.fixture(scope="module")
def groups() -> Iterator[tuple[BlockingGroup, BlockingGroup]]:
    spec = attrs.evolve(SPEC, sampler="fake", deterministic=True)
    with start_group(spec) as one, start_group(spec) as two:
        yield one, two


class TestFakeTrainer(TrainerContract):
    def read_gradient(self, directory: Path) -> Arrays:
        return _read(directory / "gradient.npz")

    def read_weights(self, directory: Path) -> Arrays:
        return _read(directory / "weights.npz")

    def read_state(self, directory: Path) -> Arrays:
        return _read_state(directory)


class TestDeterministicFakes(DeterminismContract):
    def read_state(self, directory: Path) -> Arrays:
        return _read_state(directory)


def _read_state(directory: Path) -> Arrays:
    return {f"{path.name}: {name}": array for path in directory.glob("*.npz") for name, array in _read(path).items()}


def _read(path: Path) -> Arrays:
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(zip("abcd", (arrays[name] for name in arrays.files), strict=False))
