"""A trainer and a sampler side by side, as `SamplerContract` drives them."""

from __future__ import annotations

import asyncio
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tinker_core.executors.protocol import (
    CancelCall,
    GroupCapabilities,
    ModelName,
    PublishCall,
    RetireCall,
    SaveRevisionCall,
    StateCall,
)
from tinker_core.interfaces import Sampler
from tinker_core.testing.group import BlockingGroup
from tinker_core.testing.trainer_lab import make_datum
from tinker_core.types import (
    AdamParams,
    LoraConfig,
    ModelPassResult,
    OptimizerConfig,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedOptimStep,
    PreparedSample,
    SampleOutput,
    SamplerCapabilities,
    Transport,
    WeightsRef,
)

Logprobs = npt.NDArray[np.float32]


class SamplerBench(Protocol):
    """What the contract needs; `GroupBench` offers it for samplers inside trainer ranks, `OwnBench` for others."""

    @property
    def capabilities(self) -> SamplerCapabilities:
        """The sampler's own."""

    def create_model(self, model_id: str, lora: LoraConfig) -> None:
        """Make a model in the trainer."""

    def unload_model(self, model_id: str) -> None:
        """Forget a model in the trainer."""

    def train(self, model_id: str, num_steps: int) -> None:
        """Take some steps that move every weight."""

    def forward_logprobs(self, model_id: str, tokens: list[int]) -> Logprobs:
        """The trainer's logprobs of ``tokens[1:]``, float32 ``[T - 1]``."""

    def publish(self, revision: str, model_id: str) -> None:
        """Give the sampler a model's present weights under a new name."""

    def publish_files(self, revision: str, directory: str) -> None:
        """Give the sampler weights that `save_revision` wrote."""

    def save_revision(self, revision: str, directory: str) -> None:
        """Have a revision written into an empty directory."""

    def retire(self, revision: str) -> None:
        """Take a revision away."""

    def sample(self, sample: PreparedSample) -> Future[SampleOutput]:
        """Begin a sample."""

    def cancel(self, request_id: str) -> None:
        """Give a sample up."""


class _TrainerSide:
    """What both benches do with their trainer."""

    _group: BlockingGroup
    _capabilities: SamplerCapabilities

    @property
    def capabilities(self) -> SamplerCapabilities:
        """The sampler's own."""
        return self._capabilities

    def create_model(self, model_id: str, lora: LoraConfig) -> None:
        """Make a model."""
        self._group.call(
            "create", PreparedModel(model_id=model_id, lora_config=lora, optimizer_config=OptimizerConfig())
        )

    def unload_model(self, model_id: str) -> None:
        """Forget a model."""
        self._group.call("unload", ModelName(model_id=model_id))

    def train(self, model_id: str, num_steps: int) -> None:
        """Steps on fixed random data."""
        random = np.random.default_rng(len(model_id))
        tokens, targets = random.integers(0, self._capabilities.vocab_size, (2, 16))
        datum = make_datum(tokens, targets, weights=np.ones(16, np.float32))
        for _ in range(num_steps):
            request = PreparedModelPass(request_id="p", model_id=model_id, data=(datum,), loss_fn="cross_entropy")
            (passed,) = self._group.call("forward_backward", PreparedModelPassBatch(requests=(request,)))
            assert passed.error is None, passed.error
            step = PreparedOptimStep(
                request_id="s", model_id=model_id, adam_params=AdamParams(learning_rate=0.01, eps=1e-8)
            )
            (stepped,) = self._group.call("optim_step", (step,))
            assert stepped.error is None, stepped.error

    def forward_logprobs(self, model_id: str, tokens: list[int]) -> Logprobs:
        """A forward pass of the trainer."""
        request = PreparedModelPass(
            request_id="f",
            model_id=model_id,
            data=(make_datum(tokens[:-1], tokens[1:]),),
            loss_fn="cross_entropy",
            forward_only=True,
        )
        result: ModelPassResult
        (result,) = self._group.call("forward_backward", PreparedModelPassBatch(requests=(request,)))
        assert result.output is not None, result.error
        return result.output.loss_fn_outputs[0]["logprobs"].data.astype(np.float32)


class GroupBench(_TrainerSide):
    """Implements `SamplerBench` over a worker group whose sampler runs in the trainer's ranks."""

    def __init__(self, group: BlockingGroup) -> None:
        self._group = group
        capabilities: GroupCapabilities = group.call("capabilities")
        assert capabilities.sampler is not None
        self._capabilities = capabilities.sampler

    def publish(self, revision: str, model_id: str) -> None:
        """Copy the live row in the ranks."""
        ref = WeightsRef(transport=Transport.IN_PROCESS, model_id=model_id)
        self._group.call("publish", PublishCall(revision=revision, ref=ref))

    def publish_files(self, revision: str, directory: str) -> None:
        """Read a directory in the ranks."""
        ref = WeightsRef(transport=Transport.FILE, directory=directory)
        self._group.call("publish", PublishCall(revision=revision, ref=ref))

    def save_revision(self, revision: str, directory: str) -> None:
        """Write in the ranks."""
        self._group.call("save_revision", SaveRevisionCall(revision=revision, directory=directory))

    def retire(self, revision: str) -> None:
        """Retire in the ranks."""
        self._group.call("retire", RetireCall(revision=revision))

    def sample(self, sample: PreparedSample) -> Future[SampleOutput]:
        """Begin a sample in the ranks."""
        return self._group.start("sample", sample)

    def cancel(self, request_id: str) -> None:
        """Cancel in the ranks."""
        self._group.call("cancel", CancelCall(request_id=request_id))


class OwnBench(_TrainerSide):
    """Implements `SamplerBench` over a worker group and a sampler of placement OWN that has started."""

    def __init__(self, group: BlockingGroup, sampler: Sampler, directory: Path) -> None:
        """``directory`` is a place for weights on their way, best in memory."""
        self._group = group
        self._sampler = sampler
        self._directory = directory
        self._capabilities = sampler.capabilities()
        self._running: dict[str, asyncio.Task[SampleOutput]] = {}

    def publish(self, revision: str, model_id: str) -> None:
        """Hand the live row over through memory."""
        with tempfile.TemporaryDirectory(dir=self._directory, ignore_cleanup_errors=True) as directory:
            self._group.call("export", StateCall(model_id=model_id, directory=directory))
            self._publish(revision, WeightsRef(transport=Transport.SHARED_MEMORY, directory=directory))

    def publish_files(self, revision: str, directory: str) -> None:
        """Have a directory read."""
        self._publish(revision, WeightsRef(transport=Transport.FILE, directory=directory))

    def _publish(self, revision: str, ref: WeightsRef) -> None:
        self._group.run(self._sampler.publish(revision, ref)).result(timeout=120)

    def save_revision(self, revision: str, directory: str) -> None:
        """Have a revision written."""
        self._group.run(self._sampler.save_revision(revision, directory)).result(timeout=120)

    def retire(self, revision: str) -> None:
        """Take a revision away."""
        self._group.run(self._sampler.retire(revision)).result(timeout=120)

    def sample(self, sample: PreparedSample) -> Future[SampleOutput]:
        """Begin a sample."""
        return self._group.run(self._sample(sample))

    async def _sample(self, sample: PreparedSample) -> SampleOutput:
        task = self._running[sample.request_id] = asyncio.ensure_future(self._sampler.sample(sample))
        try:
            return await task
        finally:
            del self._running[sample.request_id]

    def cancel(self, request_id: str) -> None:
        """Give a sample up, as the engine does: by cancelling who waits for it."""
        self._group.run(self._cancel(request_id)).result(timeout=120)

    async def _cancel(self, request_id: str) -> None:
        task = self._running.get(request_id)
        if task is not None:
            task.cancel()
