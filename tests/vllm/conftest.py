"""A trainer and a vLLM sampler side by side, for all tests of this folder that need no server."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.models import Kind, write_tiny_model
from tests.vllm.required import require_vllm
from tinker_core.interfaces import SamplerContext, WorkerGroupSpec
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.sampler_bench import OwnBench
from tinker_core.types import BaseModelSpec

HIDDEN_SIZE = 128
"""vLLM's attention on CPUs takes heads of 32 features and more; these models have four."""
LORA_SLOTS = 3
"""Fewer than the models of some tests, so that slots are full and change hands."""


@pytest.fixture(scope="session", autouse=True)
def vllm_is_installed() -> None:
    """All tests of this folder need it."""
    require_vllm()


@contextmanager
def vllm_bench(
    directory: Path,
    kind: Kind = "llama",
    *,
    tie: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    **options: Any,
) -> Iterator[tuple[OwnBench, Any, BlockingGroup]]:
    """A bench, its sampler, and the trainer's group."""
    require_vllm()
    from tinker_sampler_vllm.build import build_sampler

    path = write_tiny_model(directory / "model", kind, tie=tie, hidden_size=HIDDEN_SIZE)
    base_model = BaseModelSpec(name="tiny", path=str(path))
    spec = WorkerGroupSpec(
        base_model=base_model,
        trainer="fsdp",
        sampler=None,
        plugins=("core", "fsdp"),
        num_ranks=1,
        device=device,
        dtype=dtype,
        max_models=6,
        max_context_length=64,
        environment={"OMP_NUM_THREADS": "1"},
    )
    with (
        tempfile.TemporaryDirectory(prefix="tinker-") as sockets,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        context = SamplerContext(
            base_model=base_model,
            device=device,
            dtype=dtype,
            directory=sockets,
            memory_directory=f"{memory}/held",
            server_id="srv-test",
            max_revisions=8,
            max_lora_rank=8,
            max_context_length=64,
            options={"vllm-lora-slots": LORA_SLOTS, "vllm-kv-cache-mib": 64, **options},
        )
        with start_group(spec) as group:

            async def build() -> Any:
                sampler = build_sampler(context)
                await sampler.start()
                return sampler

            sampler = group.run(build()).result(timeout=280)  # the first start of a fresh installation is slow
            try:
                yield OwnBench(group, sampler, Path(memory)), sampler, group
            finally:
                group.run(sampler.close()).result(timeout=60)
