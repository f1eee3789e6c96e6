"""Trainer and vLLM are compared before a server is ready, and a vLLM that was set up otherwise is found out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.models import write_tiny_model
from tests.vllm.conftest import HIDDEN_SIZE, LORA_SLOTS
from tinker_core.engine import Engine, EngineConfig
from tinker_core.errors import AgreementError
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import Sampler, SamplerContext, SamplerPlugin
from tinker_core.plugins import Plugins
from tinker_core.types import BaseModelSpec, Placement, WeightsRef

pytestmark = pytest.mark.slow


@attrs.define
class SetUpOtherwise:
    """The sampler ``vllm``, with another base model or another idea of how adapters are scaled."""

    model: Path | None = None
    scale: int = 1

    @hookimpl
    def tinker_register_sampler(self, register: Callable[[SamplerPlugin], None]) -> None:
        register(SamplerPlugin(name="otherwise", placement=Placement.OWN, build=self._build))

    def _build(self, context: SamplerContext) -> Sampler:
        from tinker_sampler_vllm.build import build_sampler

        if self.model is not None:
            context = attrs.evolve(context, base_model=attrs.evolve(context.base_model, path=str(self.model)))
        sampler: Any = build_sampler(context)
        publish = sampler.publish

        async def publish_scaled(revision: str, ref: WeightsRef) -> None:
            config = Path(str(ref.directory)) / "adapter_config.json"
            values = json.loads(config.read_text())
            config.write_text(json.dumps({**values, "lora_alpha": self.scale * values["lora_alpha"]}))
            await publish(revision, ref)

        sampler.publish = publish_scaled
        return sampler  # type: ignore[no-any-return]


@asynccontextmanager
async def opened(data_dir: Path, model: Path, sampler: SetUpOtherwise) -> AsyncIterator[Engine]:
    plugins = Plugins.load("core", "fsdp")
    plugins.register(sampler, "otherwise")
    config = EngineConfig(
        base_models=(BaseModelSpec(name="tiny", path=str(model)),),
        data_dir=data_dir,
        backend="fsdp",
        sampler="otherwise",
        plugins=("core", "fsdp"),
        max_context_length=64,
        max_lora_rank=8,
        options={"vllm-lora-slots": LORA_SLOTS, "vllm-kv-cache-mib": 64},
        worker_environment={"OMP_NUM_THREADS": "1"},
    )
    async with Engine(config, plugins) as engine:
        yield engine


def test_vllm_agrees_with_the_trainer_until_adapters_are_scaled_otherwise(tmp_path: Path) -> None:
    async def body() -> None:
        model = write_tiny_model(tmp_path / "model", tie=True, hidden_size=HIDDEN_SIZE)
        sampler = SetUpOtherwise()
        async with opened(tmp_path / "data", model, sampler) as engine:
            await engine.wait_ready()
            report = engine.metrics()[0].agreement
            assert report is not None
            assert report.figures.keys() == {"base", "adapter", "decode"}
            assert all(figures.max < 1e-4 for figures in report.figures.values()), report
            sampler.scale = 2
            report = await engine.compare_sides("tiny")
            assert "in all their parts (attention, mlp, unembed), such as their scale" in report.suspect
            assert not engine.readiness().ready

    asyncio.run(body())


def test_a_vllm_with_other_model_files_is_refused_and_the_files_are_suspected(tmp_path: Path) -> None:
    async def body() -> None:
        model = write_tiny_model(tmp_path / "model", tie=True, hidden_size=HIDDEN_SIZE)
        other = write_tiny_model(tmp_path / "other", tie=True, hidden_size=HIDDEN_SIZE, seed=1)
        async with opened(tmp_path / "data", model, SetUpOtherwise(model=other)) as engine:
            with pytest.raises(AgreementError) as refused:
                await engine.wait_ready()
            assert f"The trainer 'fsdp' reads {model} as float32" in str(refused.value)
            assert "base model 'tiny'" in str(refused.value)
            assert "same files and dtype" in str(refused.value)
            assert engine.readiness().models["tiny"].startswith("failed: trainer and sampler")

    asyncio.run(body())
