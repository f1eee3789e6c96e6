"""The trainer contract on Megatron-Core, in worlds that need nothing but Megatron-Core itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.megatron.groups import start_megatron
from tests.megatron.loaded_modules import LOADED, LOSS
from tinker_core.testing import BlockingGroup
from tinker_core.testing.trainer_contract import TrainerContract
from tinker_core.testing.trainer_lab import TrainerLab

WORLDS = {
    "one rank": (1, "qwen3", True, {}),
    "tensor parallel": (2, "llama", False, {"tensor-parallel": 2}),
    "data parallel": (2, "qwen2", True, {}),
}
EVERY_DAY = ("tensor parallel",)
world_names = [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in WORLDS]


@pytest.fixture(scope="module", params=world_names)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingGroup]:
    num_ranks, kind, tie, options = WORLDS[request.param]
    with start_megatron(tmp_path_factory.mktemp("model"), kind, num_ranks, options, tie=tie) as group:
        yield group


class TestMegatronTrainer(TrainerContract):
    def test_the_cpu_shim_is_not_loaded(self, lab: TrainerLab) -> None:
        output = lab.run_one(lab.request(lab.create(), lab.data(0), LOSS))
        assert output.metrics[LOADED] == 0
