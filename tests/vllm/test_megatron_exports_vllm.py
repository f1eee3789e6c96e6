"""vLLM takes what tensor-parallel ranks of Megatron-Core export, and means the same by it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.models import Kind, write_tiny_model
from tests.vllm.conftest import HIDDEN_SIZE, LORA_SLOTS
from tinker_core.engine import Engine, EngineConfig
from tinker_core.plugins import Plugins
from tinker_core.types import BaseModelSpec

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kind", "tie"), [("llama", False), ("qwen3", True)])
def test_vllm_finds_the_logprobs_of_the_trainer_with_exports_of_tensor_parallel_ranks(
    tmp_path: Path, kind: Kind, *, tie: bool
) -> None:
    """Before a server is ready both sides are asked for logprobs: of the base model, and of an adapter with random
    numbers in all its parts, which the trainer exports and vLLM loads."""

    async def body() -> None:
        plugins = ("core", "megatron", "vllm")
        model = write_tiny_model(tmp_path / "model", kind, tie=tie, hidden_size=HIDDEN_SIZE)
        config = EngineConfig(
            base_models=(BaseModelSpec(name="tiny", path=str(model)),),
            data_dir=tmp_path / "data",
            backend="megatron",
            sampler="vllm",
            plugins=plugins,
            num_ranks=2,
            max_context_length=64,
            max_lora_rank=8,
            options={"tensor-parallel": 2, "vllm-lora-slots": LORA_SLOTS, "vllm-kv-cache-mib": 64},
            worker_environment={"OMP_NUM_THREADS": "1"},
        )
        async with Engine(config, Plugins.load(*plugins)) as engine:
            await engine.wait_ready()
            report = engine.metrics()[0].agreement
            assert report is not None
            assert report.figures.keys() == {"base", "adapter", "decode"}
            assert all(figures.max < 1e-4 for figures in report.figures.values()), report

    asyncio.run(body())
