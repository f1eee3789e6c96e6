"""The trainer ``nano``: what `tinker_core.interfaces.Trainer` asks for, put together from `tinker_core.training`."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path

import torch

from tinker_backend_nano.loading import load_llama
from tinker_backend_nano.model import Llama
from tinker_core.errors import ConfigurationError, TinkerError, UserError
from tinker_core.executors.rank_loop import describe_error
from tinker_core.interfaces import ModelHandle, RankContext, StateWriter, Trainer, TrainerParts
from tinker_core.optimizer_families import check_step_family, require_family
from tinker_core.training.adapters import AdapterLayout
from tinker_core.training.determinism import make_deterministic
from tinker_core.training.graphs.loss import custom_loss_plugin
from tinker_core.training.handle import ANY_RANK, LiveModelHandle
from tinker_core.training.host_copies import HostCopies
from tinker_core.training.logprobs import LossHead
from tinker_core.training.micro_batch import PassLayout, PassRequest
from tinker_core.training.passes import PackedModel, PassRunner, PassTally
from tinker_core.training.state import ModelState, ModelTable
from tinker_core.training.targets import select_linears
from tinker_core.training.validation import PassLimits, check_pass
from tinker_core.training.world import World
from tinker_core.types import (
    CUSTOM_LOSS,
    CheckpointType,
    LoraConfig,
    ModelPassResult,
    OptimStepOutput,
    OptimStepResult,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedOptimStep,
    SnapshotParts,
    TrainerCapabilities,
    Transport,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NanoPackedModel(PackedModel):
    """Runs the micro-batches of a pass."""

    def __init__(self, llama: Llama, world: World) -> None:
        self.llama, self.world = llama, world

    def run(self, layout: PassLayout, tally: PassTally) -> Generator[None, None, None]:
        for bins in layout.passes:
            batch = layout.micro_batch(bins[self.world.rank], tally.gradients, self.world.device)
            head = LossHead(batch.head_data, batch.segments, num_owners=len(layout.requests))
            with torch.set_grad_enabled(layout.needs_gradient(bins)):
                hidden, result = self.llama(batch.input_ids, batch.position_ids, batch.plan, batch.segments, head)
            if result.grad_hidden is not None:
                # Adapters' gradients go to their own rows on the way.
                torch.autograd.backward(hidden, result.grad_hidden)
            tally.fail(result.failure)
            tally.add(batch.items, result)
            yield  # samples and other work have their turn here


class NanoTrainer(Trainer):
    """One instance per rank; all ranks hold the same, and rank 0 answers."""

    def __init__(self, context: RankContext, parts: TrainerParts) -> None:
        if context.dtype not in DTYPES:
            raise ConfigurationError(f"dtype {context.dtype!r} is not supported; use {' or '.join(DTYPES)}")
        if context.deterministic:
            make_deterministic()
        self.context, self.parts = context, parts
        self.dtype = DTYPES[context.dtype]
        self.world = World(context)
        self.llama = load_llama(context.base_model.path, self.dtype, self.world.device)
        self.linears = self.llama.install_lora()
        self.models = ModelTable(context.max_models)
        self.copies = HostCopies()
        self.runner = PassRunner(
            model=NanoPackedModel(self.llama, self.world),
            world=self.world,
            budget=context.micro_batch_tokens,
            one_by_one=context.deterministic,
        )
        longest = self.llama.config["max_position_embeddings"]
        self.limits = PassLimits(
            vocab_size=self.llama.config["vocab_size"],
            max_context_length=min(longest, context.max_context_length or longest),
        )

    def capabilities(self) -> TrainerCapabilities:
        return TrainerCapabilities(
            losses=tuple(sorted({*self.parts.losses, CUSTOM_LOSS})),
            optimizers=tuple(sorted(self.parts.optimizers)),
            max_lora_rank=self.context.max_lora_rank,
            max_models=self.context.max_models,
            max_context_length=self.limits.max_context_length,
            vocab_size=self.limits.vocab_size,
            transports=(Transport.IN_PROCESS, Transport.SHARED_MEMORY, Transport.FILE),
            offers_model_handle=True,
            architecture="llama",
        )

    def create(self, model: PreparedModel) -> None:
        self.models.check_room(model.model_id)
        layout = self._layout(model.lora_config, max_rank=self.context.max_lora_rank)
        require_family(model.optimizer_config.type, tuple(self.parts.optimizers))
        optimizer = self.parts.optimizers[model.optimizer_config.type]
        build = partial(optimizer.build, model.optimizer_config.settings)
        self.models.add(ModelState(model, layout, build, dtype=self.dtype, device=self.world.device))

    def _layout(self, config: LoraConfig, *, max_rank: int) -> AdapterLayout:
        return AdapterLayout(select_linears(self.linears, config, max_rank=max_rank), config)

    def forward_backward(self, batch: PreparedModelPassBatch) -> Generator[None, None, tuple[ModelPassResult, ...]]:
        results: dict[int, ModelPassResult] = {}
        runnable: dict[int, PassRequest] = {}
        for index, request in enumerate(batch.requests):
            try:
                runnable[index] = self._checked(request)
            except UserError as error:
                results[index] = ModelPassResult(request_id=request.request_id, error=describe_error(error))
        passed = yield from self.runner.run(list(runnable.values()))
        results.update(zip(runnable, passed, strict=True))
        return tuple(results[index] for index in range(len(batch.requests)))

    def _checked(self, request: PreparedModelPass) -> PassRequest:
        losses = self.parts.losses
        if request.loss_fn == CUSTOM_LOSS and request.custom_loss is not None:
            losses = {CUSTOM_LOSS: custom_loss_plugin(request.custom_loss)}
        state = self.models[request.model_id]
        return PassRequest(request=request, state=state, loss=check_pass(request, losses, self.limits))

    def optim_step(self, steps: Sequence[PreparedOptimStep]) -> tuple[OptimStepResult, ...]:
        return tuple(self._step(step) for step in steps)

    def _step(self, step: PreparedOptimStep) -> OptimStepResult:
        try:
            state = self.models[step.model_id]
            check_step_family(state.model.optimizer_config.type, step.adam_params, step.optimizer_params)
            metrics = state.step(step)
        except UserError as error:
            return OptimStepResult(request_id=step.request_id, error=describe_error(error))
        return OptimStepResult(request_id=step.request_id, output=OptimStepOutput(metrics=metrics))

    def capture(
        self, model_id: str, parts: SnapshotParts, kind: CheckpointType = CheckpointType.TRAINING
    ) -> StateWriter:
        state = self.models[model_id]
        if self.world.rank > 0:
            return lambda directory: None  # rank 0 writes what all have
        return state.capture(self.context.base_model.name, kind, parts, self.copies)

    def capture_weights(self, model_id: str) -> StateWriter:
        return self.capture(model_id, SnapshotParts(optimizer=False), CheckpointType.SAMPLER)

    def restore(self, model_id: str, directory: str, parts: SnapshotParts) -> None:
        state = self.models[model_id]
        saved, failure = None, None
        try:
            saved = state.read(Path(directory), self.context.base_model.name, parts)
        except TinkerError as error:
            failure = error
        self.world.fail_together(failure)  # all ranks change, or none
        assert saved is not None
        state.take(saved)

    def unload(self, model_id: str) -> None:
        self.models.remove(model_id)

    def model_handle(self) -> ModelHandle:
        end = self.llama.config.get("eos_token_id")
        return LiveModelHandle(
            model=self.llama,
            models=self.models,
            world=self.world,
            capabilities=self.capabilities(),
            base_model=self.context.base_model.name,
            dtype=self.dtype,
            eos_tokens=frozenset([] if end is None else end if isinstance(end, list) else [end]),
            make_layout=partial(self._layout, max_rank=ANY_RANK),
        )

    def close(self) -> None:
        self.world.close()
