"""The trainer contract on a mixture of experts that two ranks share, under the shim of `cpu_shim`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.megatron.groups import start_megatron
from tinker_core.testing import BlockingGroup
from tinker_core.testing.trainer_contract import TrainerContract

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingGroup]:
    with start_megatron(tmp_path_factory.mktemp("model"), "qwen3_moe", 2, {"expert-parallel": 2}) as group:
        yield group


class TestMegatronTrainerWithExperts(TrainerContract):
    pass
