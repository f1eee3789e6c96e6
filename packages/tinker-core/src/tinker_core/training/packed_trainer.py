"""What trainers on packed passes have in common: all of `tinker_core.interfaces.Trainer` but the model itself."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import attrs
import torch
from torch import nn

from tinker_core.errors import ConfigurationError, UserError
from tinker_core.executors.rank_loop import describe_error
from tinker_core.interfaces import (
    FlatOptimizer,
    ModelHandle,
    OptimizerPlugin,
    RankContext,
    StateWriter,
    Trainer,
    TrainerParts,
)
from tinker_core.optimizer_families import check_step_family, require_family
from tinker_core.training.adapters import AdapterLayout, LinearSpec
from tinker_core.training.determinism import make_deterministic
from tinker_core.training.graphs.loss import custom_loss_plugin
from tinker_core.training.handle import ANY_RANK, LiveModelHandle
from tinker_core.training.host_copies import HostCopies
from tinker_core.training.micro_batch import PassRequest
from tinker_core.training.passes import PackedModel, PassRunner
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
    SettingValue,
    SnapshotParts,
    TrainerCapabilities,
    Transport,
)


@attrs.frozen(kw_only=True, eq=False)
class BaseModelShape:
    """What a trainer must know of its base model."""

    linears: tuple[LinearSpec, ...]
    """Those that adapters may change, whole, in model order."""
    dtype: torch.dtype
    """Compute type."""
    vocab_size: int
    context_length: int
    """Tokens that the model itself can take."""
    architecture: str


def prepare_rank(context: RankContext) -> None:
    """What comes before a model is loaded; raises `ConfigurationError`."""
    if context.micro_batch_tokens < 1:
        raise ConfigurationError(f"micro-batch-tokens must be at least 1, got {context.micro_batch_tokens}")
    if context.deterministic:
        make_deterministic()


class PackedTrainer(Trainer):
    """A trainer around a `PackedModel`. A subclass calls `prepare_rank`, loads its model, and hands it over."""

    rows_are_whole: ClassVar[bool] = True
    """Whether all ranks hold the same rows, so that rank 0 alone copies them; else they are collected there."""
    offers_handle: ClassVar[bool] = False
    """Whether `model_handle` gives the live model."""

    def __init__(
        self,
        context: RankContext,
        parts: TrainerParts,
        *,
        world: World,
        model: PackedModel,
        shape: BaseModelShape,
        models: ModelTable | None = None,
        one_by_one: bool = False,
    ) -> None:
        """``models``: where fewer fit than the context says; ``one_by_one``: requests never share a pass."""
        self.context, self.parts = context, parts
        self.world, self.shape = world, shape
        self.models = ModelTable(context.max_models) if models is None else models
        self._copies = HostCopies()
        self._runner = PassRunner(
            model=model,
            world=world,
            budget=context.micro_batch_tokens,
            one_by_one=context.deterministic or one_by_one,
        )
        longest = shape.context_length
        self.limits = PassLimits(
            vocab_size=shape.vocab_size, max_context_length=min(longest, context.max_context_length or longest)
        )

    def capabilities(self) -> TrainerCapabilities:
        """LoRA on text, in process or as files."""
        return TrainerCapabilities(
            losses=tuple(sorted({*self.parts.losses, CUSTOM_LOSS})),
            optimizers=tuple(sorted(self.parts.optimizers)),
            max_lora_rank=self.context.max_lora_rank,
            max_models=self.context.max_models,
            max_context_length=self.limits.max_context_length,
            vocab_size=self.limits.vocab_size,
            transports=(Transport.IN_PROCESS, Transport.SHARED_MEMORY, Transport.FILE),
            offers_model_handle=self.offers_handle,
            architecture=self.shape.architecture,
        )

    # --- models -------------------------------------------------------------------------------------------------------

    def create(self, model: PreparedModel) -> None:
        """Make a model with fresh rows."""
        self.models.check_room(model.model_id)
        self.models.add(self.new_state(model))

    def new_state(self, model: PreparedModel) -> ModelState:
        """A fresh adapter; raises `UserError`."""
        layout = self.adapter_layout(model.lora_config, max_rank=self.context.max_lora_rank)
        build = self.optimizer_builder(model, layout)
        return ModelState(model, layout, build, dtype=self.shape.dtype, device=self.world.device)

    def adapter_layout(self, config: LoraConfig, *, max_rank: int) -> AdapterLayout:
        """Where an adapter lies in this rank's rows; raises `InvalidLoraConfigError`."""
        linears = select_linears(self.shape.linears, config, max_rank=max_rank)
        return self.shard(AdapterLayout(linears, config))

    def shard(self, whole: AdapterLayout) -> AdapterLayout:
        """This rank's part of a layout: all of it, unless a trainer cuts rows."""
        return whole

    def optimizer_builder(self, model: PreparedModel, layout: AdapterLayout) -> Callable[[], FlatOptimizer]:
        """What makes the optimizer that a model asks for; raises `UserError` for one that is not there."""
        family, settings = model.optimizer_config.type, model.optimizer_config.settings
        require_family(family, tuple(self.parts.optimizers))
        return self.build_optimizer(self.parts.optimizers[family], settings, layout)

    def build_optimizer(
        self, plugin: OptimizerPlugin, settings: dict[str, SettingValue], layout: AdapterLayout
    ) -> Callable[[], FlatOptimizer]:
        """For rows of a layout. A trainer that cuts rows refuses a family without ``build_sharded``."""
        if plugin.build_sharded is None:
            return partial(plugin.build, settings)
        return partial(plugin.build_sharded, settings, layout.norm)

    def unload(self, model_id: str) -> None:
        """Forget a model."""
        self.models.remove(model_id)

    # --- passes and steps ---------------------------------------------------------------------------------------------

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
        state = self.models[request.model_id]
        losses = self.parts.losses
        if request.loss_fn == CUSTOM_LOSS and request.custom_loss is not None:
            losses = {CUSTOM_LOSS: custom_loss_plugin(request.custom_loss)}
        loss = check_pass(request, losses, self.limits)
        return PassRequest(request=request, state=state, loss=loss)

    def optim_step(self, steps: Sequence[PreparedOptimStep]) -> tuple[OptimStepResult, ...]:
        """Step each model alone; one bad step does not touch the others."""
        return tuple(self._step(step) for step in steps)

    def _step(self, step: PreparedOptimStep) -> OptimStepResult:
        try:
            state = self.models[step.model_id]
            check_step_family(state.model.optimizer_config.type, step.adam_params, step.optimizer_params)
            metrics = state.step(step)
        except UserError as error:
            return OptimStepResult(request_id=step.request_id, error=describe_error(error))
        return OptimStepResult(request_id=step.request_id, output=OptimStepOutput(metrics=metrics))

    # --- state --------------------------------------------------------------------------------------------------------

    def capture(self, model_id: str, parts: SnapshotParts) -> StateWriter:
        """Copy a training checkpoint in rank 0."""
        return self._capture(model_id, CheckpointType.TRAINING, parts)

    def capture_weights(self, model_id: str) -> StateWriter:
        """Copy weights for samplers in rank 0."""
        return self._capture(model_id, CheckpointType.SAMPLER, SnapshotParts(optimizer=False))

    def _capture(self, model_id: str, kind: CheckpointType, parts: SnapshotParts) -> StateWriter:
        state = self.models[model_id]
        if self.rows_are_whole and self.world.rank != 0:
            return lambda directory: None
        return state.capture(self.context.base_model.name, kind, parts, self._copies)

    def restore(self, model_id: str, directory: str, parts: SnapshotParts) -> None:
        """Read a training checkpoint in every rank; all of them take it over, or none."""
        state = self.models[model_id]
        read = partial(state.read, Path(directory), self.context.base_model.name, parts)
        state.take(self.world.together(read))

    # --- the rest -----------------------------------------------------------------------------------------------------

    def model_handle(self) -> ModelHandle | None:
        """The live model for samplers inside the ranks, where a trainer offers it."""
        return None

    def live_handle(self, root: nn.Module, eos_tokens: frozenset[int]) -> LiveModelHandle:
        """A handle of this trainer's adapters on a root module that a sampler can call."""
        return LiveModelHandle(
            model=root,
            models=self.models,
            world=self.world,
            capabilities=self.capabilities(),
            base_model=self.context.base_model.name,
            dtype=self.shape.dtype,
            eos_tokens=eos_tokens,
            make_layout=partial(self.adapter_layout, max_rank=ANY_RANK),
        )

    def close(self) -> None:
        """Leave the process group."""
        self.world.close()
