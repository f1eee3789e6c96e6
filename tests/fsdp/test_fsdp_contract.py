"""The trainer contract in worker processes, at world size 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import write_tiny_model
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.faults import FAULTS_PLUGIN
from tinker_core.testing.trainer_contract import TrainerContract
from tinker_core.types import BaseModelSpec


@pytest.fixture(scope="module", params=[1, 2])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingGroup]:
    path = write_tiny_model(tmp_path_factory.mktemp("model"), "qwen3" if request.param == 1 else "llama", tie=True)
    spec = WorkerGroupSpec(
        base_model=BaseModelSpec(name="tiny", path=str(path)),
        trainer="fsdp",
        sampler=None,
        plugins=("core", "fsdp", FAULTS_PLUGIN, "tests.fsdp.no_unpickling"),
        num_ranks=request.param,
        device="cpu",
        dtype="float32",
        micro_batch_tokens=24,
        max_models=5,
        environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    with start_group(spec) as group:
        yield group


class TestFsdpTrainer(TrainerContract):
    pass
