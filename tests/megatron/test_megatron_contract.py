"""The trainer contract on Megatron-Core, in worlds that need nothing but Megatron-Core itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.megatron.groups import start_megatron
from tinker_core.testing import BlockingGroup
from tinker_core.testing.trainer_contract import TrainerContract

WORLDS = {
    "one rank": (1, "qwen3", True, {}),
    "tensor parallel": (2, "llama", False, {"tensor-parallel": 2}),
    "data parallel": (2, "qwen2", True, {}),
}


@pytest.fixture(scope="module", params=WORLDS)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingGroup]:
    num_ranks, kind, tie, options = WORLDS[request.param]
    with start_megatron(tmp_path_factory.mktemp("model"), kind, num_ranks, options, tie=tie) as group:
        yield group


class TestMegatronTrainer(TrainerContract):
    pass
