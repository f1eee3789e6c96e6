"""A trainer and the sampler ``vllm`` in this process, without server and SDK: where the time of a publication goes."""

from __future__ import annotations

import itertools
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from tinker_core.executors.protocol import StateCall
from tinker_core.interfaces import SamplerContext, WorkerGroupSpec
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.sampler_bench import OwnBench
from tinker_core.types import (
    BaseModelSpec,
    LoraConfig,
    ModelInput,
    PreparedSample,
    SampleInput,
    SamplingParams,
    Transport,
    WeightsRef,
)
from tinker_sampler_vllm.build import build_sampler
from tinker_sampler_vllm.sampler import VllmSampler

MODEL_ID = "bench"


@attrs.frozen
class Publication:
    """Seconds of each part, in their order."""

    export: float
    """The trainer copied its row and wrote it into memory."""
    take: float
    """The sampler took the files over."""
    load: float
    """An engine read them and put them where its batches find them."""
    first_token: float
    second_token: float
    """The same sample once more, with another prompt: what the first one would take if nothing were new."""


class EngineAlone:
    """Publishes and samples without a server."""

    def __init__(self, group: BlockingGroup, sampler: VllmSampler, memory: Path) -> None:
        self._group = group
        self._sampler = sampler
        self._memory = memory
        self._bench = OwnBench(group, sampler, memory)

    def create(self, rank: int) -> None:
        """Make the one model, with dense factors."""
        self._bench.create_model(MODEL_ID, LoraConfig(rank=rank, seed=0))
        self._bench.train(MODEL_ID, 1)

    def publish(self, prompts: tuple[list[int], list[int]]) -> Publication:
        """One publication and two samples of one token each."""
        revision = uuid.uuid4().hex
        self._bench.train(MODEL_ID, 1)
        with tempfile.TemporaryDirectory(dir=self._memory, ignore_cleanup_errors=True) as directory:
            times = [time.perf_counter()]
            self._group.call("export", StateCall(model_id=MODEL_ID, directory=directory, background=True))
            times.append(time.perf_counter())
            ref = WeightsRef(transport=Transport.SHARED_MEMORY, directory=directory)
            self._sampler._weights.take(revision, ref)
        times.append(time.perf_counter())
        (keeper,) = self._sampler._keepers
        self._group.run(self._sampler._give(keeper, revision)).result()
        times.append(time.perf_counter())
        for prompt in prompts:
            self._bench.sample(one_token(revision, prompt)).result()
            times.append(time.perf_counter())
        self._bench.retire(revision)
        return Publication(*(after - before for before, after in itertools.pairwise(times)))


def one_token(revision: str, prompt: list[int]) -> PreparedSample:
    """A sample of one token."""
    request = SampleInput(
        sampling_session_id="bench",
        seq_id=0,
        prompt=ModelInput.from_ints(prompt),
        sampling_params=SamplingParams(max_tokens=1, seed=0),
    )
    return PreparedSample(request_id=uuid.uuid4().hex, revision=revision, request=request)


@contextmanager
def engine_alone(model: Path, device: str, dtype: str, handoff: Path) -> Iterator[EngineAlone]:
    """Start trainer and sampler with the server's defaults."""
    base_model = BaseModelSpec(name="smollm2", path=str(model))
    spec = WorkerGroupSpec(
        base_model=base_model,
        trainer="fsdp",
        sampler=None,
        plugins=("core", "fsdp"),
        num_ranks=1,
        device=device,
        dtype=dtype,
    )
    with (
        tempfile.TemporaryDirectory(prefix="tinker-") as sockets,
        tempfile.TemporaryDirectory(dir=handoff) as memory,
        start_group(spec) as group,
    ):
        context = SamplerContext(
            base_model=base_model,
            device=device,
            dtype=dtype,
            directory=sockets,
            memory_directory=f"{memory}/held",
            server_id="srv-bench",
        )

        async def start() -> Any:
            sampler = build_sampler(context)
            await sampler.start()
            return sampler

        sampler = group.run(start()).result()
        try:
            yield EngineAlone(group, sampler, Path(memory))
        finally:
            group.run(sampler.close()).result()
