"""The trainer ``fsdp``: many LoRA models on one frozen, sharded base model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path

from tinker_backend_fsdp.handle import make_handle
from tinker_backend_fsdp.loading import load_model
from tinker_backend_fsdp.packed import FsdpPackedModel
from tinker_core.errors import ConfigurationError, TinkerError, UserError
from tinker_core.executors.rank_loop import describe_error
from tinker_core.interfaces import RankContext, StateWriter, TrainerParts
from tinker_core.optimizer_families import check_step_family, require_family
from tinker_core.training.adapters import AdapterLayout
from tinker_core.training.determinism import make_deterministic
from tinker_core.training.graphs.loss import custom_loss_plugin
from tinker_core.training.handle import LiveModelHandle
from tinker_core.training.host_copies import HostCopies
from tinker_core.training.micro_batch import PassRequest
from tinker_core.training.passes import PassRunner
from tinker_core.training.state import ModelState, ModelTable
from tinker_core.training.targets import select_linears
from tinker_core.training.validation import PassLimits, check_pass
from tinker_core.training.world import World
from tinker_core.types import (
    CUSTOM_LOSS,
    CheckpointType,
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


class FsdpTrainer:
    """Implements `tinker_core.interfaces.Trainer`, one instance per rank."""

    def __init__(self, context: RankContext, parts: TrainerParts) -> None:
        if context.micro_batch_tokens < 1:
            raise ConfigurationError(f"micro-batch-tokens must be at least 1, got {context.micro_batch_tokens}")
        if context.deterministic:
            make_deterministic()
        self._context = context
        self._parts = parts
        self._base_model = context.base_model.name
        self._world = World(context)
        self._loaded = load_model(context.base_model.path, context.dtype, self._world)
        self._models = ModelTable(context.max_models)
        self._copies = HostCopies()
        self._runner = PassRunner(
            model=FsdpPackedModel(root=self._loaded.root, world=self._world),
            world=self._world,
            budget=context.micro_batch_tokens,
            one_by_one=context.deterministic,
        )
        longest = self._loaded.context_length
        self._limits = PassLimits(
            vocab_size=self._loaded.vocab_size,
            max_context_length=min(longest, context.max_context_length or longest),
        )

    def capabilities(self) -> TrainerCapabilities:
        """LoRA on text, in process or as files."""
        return TrainerCapabilities(
            losses=tuple(sorted({*self._parts.losses, CUSTOM_LOSS})),
            optimizers=tuple(sorted(self._parts.optimizers)),
            max_lora_rank=self._context.max_lora_rank,
            max_models=self._context.max_models,
            max_context_length=self._limits.max_context_length,
            vocab_size=self._limits.vocab_size,
            transports=(Transport.IN_PROCESS, Transport.SHARED_MEMORY, Transport.FILE),
            offers_model_handle=True,
            architecture=self._loaded.architecture,
        )

    def create(self, model: PreparedModel) -> None:
        """Make a model with fresh rows."""
        self._models.check_room(model.model_id)
        linears = select_linears(self._loaded.linears, model.lora_config, max_rank=self._context.max_lora_rank)
        require_family(model.optimizer_config.type, tuple(self._parts.optimizers))
        optimizer = self._parts.optimizers[model.optimizer_config.type]
        layout = AdapterLayout(linears, model.lora_config)
        build = partial(optimizer.build, model.optimizer_config.settings)
        state = ModelState(model, layout, build, dtype=self._loaded.dtype, device=self._world.device)
        self._models.add(state)

    def forward_backward(self, batch: PreparedModelPassBatch) -> Generator[None, None, tuple[ModelPassResult, ...]]:
        """Run the requests that are valid in one pass; the others fail alone, before it."""
        results: dict[int, ModelPassResult] = {}
        runnable: dict[int, PassRequest] = {}
        for index, request in enumerate(batch.requests):
            try:
                runnable[index] = self._checked(request)
            except UserError as error:
                results[index] = ModelPassResult(request_id=request.request_id, error=describe_error(error))
        passed = yield from self._runner.run(list(runnable.values()))
        results.update(zip(runnable, passed, strict=True))
        return tuple(results[index] for index in range(len(batch.requests)))

    def _checked(self, request: PreparedModelPass) -> PassRequest:
        state = self._models[request.model_id]
        losses = self._parts.losses
        if request.loss_fn == CUSTOM_LOSS and request.custom_loss is not None:
            losses = {CUSTOM_LOSS: custom_loss_plugin(request.custom_loss)}
        loss = check_pass(request, losses, self._limits)
        return PassRequest(request=request, state=state, loss=loss)

    def optim_step(self, steps: Sequence[PreparedOptimStep]) -> tuple[OptimStepResult, ...]:
        """Step each model alone; one bad step does not touch the others."""
        return tuple(self._step(step) for step in steps)

    def _step(self, step: PreparedOptimStep) -> OptimStepResult:
        try:
            state = self._models[step.model_id]
            check_step_family(state.model.optimizer_config.type, step.adam_params, step.optimizer_params)
            metrics = state.step(step)
        except UserError as error:
            return OptimStepResult(request_id=step.request_id, error=describe_error(error))
        return OptimStepResult(request_id=step.request_id, output=OptimStepOutput(metrics=metrics))

    def capture(self, model_id: str, parts: SnapshotParts) -> StateWriter:
        """Copy a training checkpoint in rank 0."""
        return self._capture(model_id, CheckpointType.TRAINING, parts)

    def capture_weights(self, model_id: str) -> StateWriter:
        """Copy weights for samplers in rank 0."""
        return self._capture(model_id, CheckpointType.SAMPLER, SnapshotParts(optimizer=False))

    def _capture(self, model_id: str, kind: CheckpointType, parts: SnapshotParts) -> StateWriter:
        state = self._models[model_id]
        if self._world.rank == 0:
            return state.capture(self._base_model, kind, parts, self._copies)
        return lambda directory: None  # all ranks hold the same rows

    def restore(self, model_id: str, directory: str, parts: SnapshotParts) -> None:
        """Read a training checkpoint in every rank; all of them take it over, or none."""
        state = self._models[model_id]
        saved, failure = None, None
        try:
            saved = state.read(Path(directory), self._base_model, parts)
        except TinkerError as error:
            failure = error
        self._world.fail_together(failure)
        assert saved is not None
        state.take(saved)

    def unload(self, model_id: str) -> None:
        """Forget a model."""
        self._models.remove(model_id)

    def model_handle(self) -> LiveModelHandle:
        """The live model."""
        return make_handle(self._loaded, self._models, self._world, self.capabilities(), self._context.base_model)

    def close(self) -> None:
        """Leave the process group."""
        self._world.close()
