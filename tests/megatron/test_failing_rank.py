"""An exception of loss code in one rank of several fails its own request in all of them, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron.failing_rank import LOSS, PLUGIN
from tests.megatron.groups import megatron_spec
from tests.megatron.worlds import WORLDS
from tests.models import write_tiny_model
from tinker_core.testing import start_group
from tinker_core.testing.trainer_lab import TrainerLab, assert_identical, error_of, output_of, read_safetensors

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["tensor", "data", "pipeline", "sequence"])
def test_a_loss_that_raises_in_one_rank_fails_its_own_request_only(name: str, tmp_path: Path) -> None:
    world = WORLDS[name]
    path = write_tiny_model(tmp_path / "model", "llama")
    spec = megatron_spec(path, world.num_ranks, world.options, plugins=("core", "megatron", PLUGIN))
    with start_group(spec) as group:
        lab = TrainerLab(group, tmp_path)
        guilty, healthy, alone = lab.create(), lab.create(), lab.create()
        data = lab.data(2)
        failed, passed = lab.run(lab.request(guilty, lab.data(1), LOSS), lab.request(healthy, data))
        assert "this loss fails in rank 1" in error_of(failed).message
        output_of(passed)
        lab.run_one(lab.request(alone, data))
        gradients = [
            read_safetensors(lab.snapshot(model_id, gradient=True) / "gradient.safetensors")
            for model_id in (guilty, healthy, alone)
        ]
        assert gradients[0] == {}
        assert_identical(gradients[1], gradients[2])
        lab.train(guilty, 3)
