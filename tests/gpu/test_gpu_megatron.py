"""The trainer ``megatron`` on CUDA devices: NCCL, pipelines, experts by all-to-all, context parallelism, and what
Transformer Engine does.  `nox -s gpu` runs it; a world of more devices than the machine has is skipped.

Tolerances are those of `test_cuda_contracts`, for the same reasons: float32 1e-4, bfloat16 5e-2.  Single logprobs may
differ from those that Hugging Face computes on the CPU by 1e-3 in float32 and 0.2 in bfloat16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from tests.megatron.groups import megatron_spec
from tests.models import Kind, write_tiny_model
from tests.peft_reference import reference_logprobs
from tinker_core.interfaces import OptionValue
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.determinism_contract import DeterminismContract
from tinker_core.testing.sampler_bench import GroupBench, SamplerBench
from tinker_core.testing.sampler_contract import SamplerContract
from tinker_core.testing.trainer_contract import TrainerContract
from tinker_core.testing.trainer_lab import TrainerLab, logprobs_of

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 256}  # heads of 64, which every attention kernel takes


@attrs.frozen
class World:
    num_ranks: int
    kind: Kind
    options: dict[str, OptionValue] = attrs.field(factory=dict)

    def start(self, directory: Path, **settings: Any) -> Any:
        """A group of ranks with a device each, on a model that is written to ``directory``."""
        _skip_without(self)
        path = write_tiny_model(directory, self.kind, **SIZES)
        spec = megatron_spec(path, self.num_ranks, self.options, device="cuda", max_context_length=64, **settings)
        return start_group(spec)


TENSOR, PIPELINE, CONTEXT = {"tensor-parallel": 2}, {"pipeline-parallel": 2}, {"context-parallel": 2}
SEQUENCE = {**TENSOR, "sequence-parallel": True}
WORLDS = {
    "one device": World(1, "qwen3"),
    "tensor parallel": World(2, "llama", TENSOR),
    "data parallel": World(2, "qwen2"),
    "sequence parallel": World(2, "qwen3", SEQUENCE),
    "pipeline": World(2, "llama", PIPELINE),
    "context parallel": World(2, "qwen3", CONTEXT),
    "context and sequence parallel": World(4, "llama", {**CONTEXT, **SEQUENCE}),
    "tensor parallel pipeline with context parallelism": World(8, "llama", {**TENSOR, **PIPELINE, **CONTEXT}),
}
EXPERTS = {
    "experts on one device": World(1, "qwen3_moe"),
    "experts by all-gather": World(2, "qwen3_moe", {"expert-parallel": 2}),
    "experts by all-to-all": World(2, "qwen3_moe", {"expert-parallel": 2, "expert-dispatcher": "alltoall"}),
}
"""Not in bfloat16: where two experts are about as good, rounding by packing chooses another one."""
ENGINE = {
    "Transformer Engine": World(1, "qwen3", {"transformer-engine": True}),
    "Transformer Engine, sequence parallel": World(2, "llama", {"transformer-engine": True, **SEQUENCE}),
}
"""Its attention has no float32."""


def _skip_without(world: World) -> None:
    import torch

    count = torch.cuda.device_count()
    if count < world.num_ranks:
        pytest.skip(f"needs {world.num_ranks} CUDA devices, this machine has {count}")
    if world.options.get("transformer-engine") and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine")


@pytest.fixture(scope="class")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="class")
def group(request: pytest.FixtureRequest, model_path: Path, world: World) -> Iterator[BlockingGroup]:
    with world.start(model_path, dtype=request.cls.dtype) as group:
        yield group


@pytest.fixture(scope="class")
def bench(model_path: Path, world: World) -> Iterator[SamplerBench]:
    with world.start(model_path, dtype="float32", sampler="colocated") as group:
        yield GroupBench(group)


@pytest.fixture(scope="class")
def groups(model_path: Path, dtype: str) -> Iterator[tuple[BlockingGroup, BlockingGroup]]:
    settings = {"dtype": dtype, "deterministic": True}
    world = WORLDS["one device"]
    with world.start(model_path, **settings) as one, world.start(model_path, **settings) as two:
        yield one, two


def _each(worlds: dict[str, World]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("world", list(worlds.values()), ids=list(worlds), scope="class")


class MegatronOnCuda(TrainerContract):
    """The contract, and the model that Hugging Face computes."""

    dtype: str
    logprob_tolerance: float

    def test_logprobs_are_those_of_hugging_face(self, lab: TrainerLab, model_path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, self.dtype))
        data = lab.data(5, (40, 3, 1, 21))
        found = logprobs_of(lab.run_one(lab.request(lab.create(), data, forward_only=True)))
        with torch.no_grad():
            for datum, logprobs in zip(data, found, strict=True):
                expected = reference_logprobs(reference, datum)
                np.testing.assert_allclose(logprobs, expected.numpy(), rtol=0, atol=self.logprob_tolerance)


@_each(WORLDS | EXPERTS)
class TestMegatronInFloat32(MegatronOnCuda):
    dtype = "float32"
    tolerance = 1e-4
    logprob_tolerance = 1e-3


@_each(WORLDS | ENGINE)
class TestMegatronInBfloat16(MegatronOnCuda):
    dtype = "bfloat16"
    tolerance = 5e-2
    logprob_tolerance = 0.2


@_each({name: WORLDS[name] for name in ("one device", "tensor parallel", "context parallel")})
class TestMegatronSampler(SamplerContract):
    tolerance = 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], scope="class")
class TestMegatronDeterminism(DeterminismContract):
    pass
