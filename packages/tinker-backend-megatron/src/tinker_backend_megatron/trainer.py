"""The trainer ``megatron``: many LoRA models on one frozen base model that ranks share by layers, matrices or data.

With ``--full-parameter`` it trains the base model itself, for one tenant at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path

from tinker_backend_megatron.architecture import plan_topology
from tinker_backend_megatron.bridges import WEIGHTS_BRIDGE, choose_bridge
from tinker_backend_megatron.full.layout import FullLayout
from tinker_backend_megatron.full.option import wants_full_parameter
from tinker_backend_megatron.full.training import WHEN_TAKEN, FullTraining, check_is_adapter
from tinker_backend_megatron.handle import make_handle
from tinker_backend_megatron.loading import choose_dtype, load_model
from tinker_backend_megatron.packed import MegatronPackedModel
from tinker_backend_megatron.pipeline import PipelinePackedModel
from tinker_backend_megatron.rows import ShardedLayout
from tinker_backend_megatron.te_option import uses_transformer_engine
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.errors import ConfigurationError, TinkerError, UnsupportedFeatureError, UserError
from tinker_core.executors.rank_loop import describe_error
from tinker_core.interfaces import FlatOptimizer, RankContext, StateWriter, TrainerParts
from tinker_core.optimizer_families import check_step_family, require_family
from tinker_core.training.adapters import AdapterLayout
from tinker_core.training.determinism import make_deterministic
from tinker_core.training.graphs.loss import custom_loss_plugin
from tinker_core.training.handle import LiveModelHandle
from tinker_core.training.host_copies import HostCopies
from tinker_core.training.micro_batch import PassRequest
from tinker_core.training.passes import PackedModel, PassRunner
from tinker_core.training.state import ModelState, ModelTable
from tinker_core.training.targets import select_linears
from tinker_core.training.validation import PassLimits, check_pass
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


class MegatronTrainer:
    """Implements `tinker_core.interfaces.Trainer`, one instance per rank."""

    def __init__(self, context: RankContext, parts: TrainerParts) -> None:
        if context.micro_batch_tokens < 1:
            raise ConfigurationError(f"micro-batch-tokens must be at least 1, got {context.micro_batch_tokens}")
        if context.deterministic:
            make_deterministic()
        dtype = choose_dtype(context.dtype)
        self._context = context
        self._parts = parts
        self._base_model = context.base_model.name
        is_full = wants_full_parameter(context.options)
        transformer_engine = uses_transformer_engine(context)
        read_weights = choose_bridge(str(context.options.get(WEIGHTS_BRIDGE.name, WEIGHTS_BRIDGE.default)))
        self._world = MegatronWorld(context, plan_topology(context))
        try:
            self._loaded = load_model(
                context.base_model.path, dtype, self._world, transformer_engine=transformer_engine, read=read_weights
            )
        except Exception:
            self._world.close()
            raise
        self._linears = self._loaded.model_map.linears()
        self._full = FullTraining.of(self._loaded, self._world) if is_full else None
        self._models = ModelTable(1, when_taken=WHEN_TAKEN) if is_full else ModelTable(context.max_models)
        self._copies = HostCopies()
        self._runner = PassRunner(
            model=self._packed_model(),
            world=self._world,
            budget=context.micro_batch_tokens,
            one_by_one=context.deterministic or is_full,
        )
        longest = self._loaded.architecture.context_length
        self._limits = PassLimits(
            vocab_size=self._loaded.architecture.vocab_size,
            max_context_length=min(longest, context.max_context_length or longest),
        )

    def _packed_model(self) -> PackedModel:
        is_pipeline = self._world.topology.pipeline > 1
        model: PackedModel = (PipelinePackedModel if is_pipeline else MegatronPackedModel)(
            root=self._loaded.root, world=self._world
        )
        return model if self._full is None else self._full.packed(model)

    def capabilities(self) -> TrainerCapabilities:
        """LoRA, or all parameters, on text, in process or as files."""
        return TrainerCapabilities(
            losses=tuple(sorted({*self._parts.losses, CUSTOM_LOSS})),
            optimizers=tuple(sorted(self._parts.optimizers)),
            max_lora_rank=self._context.max_lora_rank if self._full is None else 0,
            max_models=self._context.max_models if self._full is None else 1,
            max_context_length=self._limits.max_context_length,
            vocab_size=self._limits.vocab_size,
            full_parameter=self._full is not None,
            transports=(Transport.IN_PROCESS, Transport.SHARED_MEMORY, Transport.FILE),
            offers_model_handle=self._world.topology.pipeline == 1,
            architecture=self._loaded.architecture.name,
        )

    def create(self, model: PreparedModel) -> None:
        """Make a model with fresh rows, or with all parameters as they are in the base model."""
        self._models.check_room(model.model_id)
        self._models.add(self._new_adapter(model) if self._full is None else self._full.new_state(model, self._builder))

    def _new_adapter(self, model: PreparedModel) -> ModelState:
        check_is_adapter(model.lora_config, self._context.max_lora_rank)
        linears = select_linears(self._linears, model.lora_config, max_rank=self._context.max_lora_rank)
        layout = self._layout(AdapterLayout(linears, model.lora_config))
        build = self._builder(model, layout)
        return ModelState(model, layout, build, dtype=self._loaded.dtype, device=self._world.device)

    def _layout(self, whole: AdapterLayout) -> ShardedLayout:
        return ShardedLayout(whole, self._loaded.model_map.shards_of, self._world.rank, self._world)

    def _builder(self, model: PreparedModel, layout: ShardedLayout | FullLayout) -> Callable[[], FlatOptimizer]:
        family, settings = model.optimizer_config.type, model.optimizer_config.settings
        require_family(family, tuple(self._parts.optimizers))
        plugin = self._parts.optimizers[family]
        if plugin.build_sharded is not None:
            return partial(plugin.build_sharded, settings, layout.norm)
        topology = self._world.topology
        if topology.tensor * topology.pipeline * topology.expert > 1:
            raise UnsupportedFeatureError(
                f"optimizer_config.type {family!r} cannot step rows that ranks share; use adamw, or a server "
                "without tensor, pipeline and expert parallelism"
            )
        return partial(plugin.build, settings)

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
        """Collect a training checkpoint in rank 0."""
        state = self._models[model_id]
        return state.capture(self._base_model, CheckpointType.TRAINING, parts, self._copies)

    def capture_weights(self, model_id: str) -> StateWriter:
        """Collect weights for samplers in rank 0."""
        state = self._models[model_id]
        return state.capture(self._base_model, CheckpointType.SAMPLER, SnapshotParts(optimizer=False), self._copies)

    def restore(self, model_id: str, directory: str, parts: SnapshotParts) -> None:
        """Read a training checkpoint, every rank its part; all of them take it over, or none."""
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
        """Forget a model; the base model becomes what it was. Raises `StorageError` when that cannot be read again."""
        self._models.remove(model_id)
        if self._full is not None and not self._models:
            self._full.live.restore_base()

    def model_handle(self) -> LiveModelHandle | None:
        """The live model, where one stage has all of it."""
        if self._world.topology.pipeline > 1:
            return None
        capabilities = self.capabilities()
        if self._full is not None:
            return self._full.handle(self._loaded, self._models, self._world, capabilities, self._base_model)
        return make_handle(self._loaded, self._models, self._world, capabilities, self._base_model, self._layout)

    def close(self) -> None:
        """Leave the process groups."""
        self._world.close()
