"""A trainer and a sampler for unit tests: a real, tiny model in numpy, so that its numbers mean something.

The model is a bigram: logits of the next token are ``E[token] @ (W + scale * B @ A)'``.  It trains, samples, saves and
restores as the contracts ask, in microseconds and without torch.  As a plugin this module registers the trainer
``fake`` and the sampler ``fake``; load it by its module name.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinker_core.encoding import make_converter
from tinker_core.errors import (
    CapacityError,
    CheckpointMismatchError,
    InvalidLoraConfigError,
    NonFiniteError,
    TinkerError,
    UnknownModelError,
)
from tinker_core.executors.rank_loop import describe_error
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import (
    LossPlugin,
    RankContext,
    SamplerPlugin,
    StateWriter,
    Trainer,
    TrainerParts,
    TrainerPlugin,
)
from tinker_core.optimizer_families import ADAMW_FAMILY, check_step_family, read_numbers, require_family
from tinker_core.testing.faults import FAILING_LOSS
from tinker_core.training.validation import PassLimits, check_pass
from tinker_core.types import (
    AdamParams,
    CheckpointManifest,
    CheckpointType,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    ModelPassResult,
    OptimStepOutput,
    OptimStepResult,
    Placement,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedOptimStep,
    SnapshotParts,
    TensorData,
    TrainerCapabilities,
    Transport,
    WeightsRef,
)

Array = npt.NDArray[np.float32]

VOCAB_SIZE = 64
HIDDEN = 16
CONTEXT_LENGTH = 512
EOS = 1
WEIGHTS_ONLY = SnapshotParts(optimizer=False)


def _computed_in_numpy(logprobs: object, context: object) -> Any:  # noqa: ANN401 - a torch tensor, were it called
    raise NotImplementedError("the fake trainer computes its losses itself")


FAKE_LOSSES = {
    loss.name: loss
    for loss in (
        LossPlugin(name="cross_entropy", compute=_computed_in_numpy, optional_inputs=("weights",)),
        LossPlugin(
            name="importance_sampling",
            compute=_computed_in_numpy,
            required_inputs=("target_tokens", "logprobs", "advantages"),
        ),
        LossPlugin(name=FAILING_LOSS, compute=_computed_in_numpy, optional_inputs=("weights",)),
    )
}
"""What the fake trainer can compute, for validation."""


class FakeBase:
    """The frozen base weights, the same in every process."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.embedding: Array = random.normal(size=(VOCAB_SIZE, HIDDEN)).astype(np.float32)
        self.unembed: Array = random.normal(size=(VOCAB_SIZE, HIDDEN)).astype(np.float32)


@attrs.define(kw_only=True, eq=False)
class FakeAdapter:
    """A ``[rank, HIDDEN]`` and B ``[VOCAB_SIZE, rank]`` of one model, with gradient and Adam moments."""

    lora: LoraConfig
    a: Array
    b: Array
    gradient: tuple[Array, Array] | None = None
    moments: list[Array] = attrs.field(factory=list)
    num_steps: int = 0

    @classmethod
    def fresh(cls, lora: LoraConfig) -> FakeAdapter:
        """A from the seed, B zero."""
        random = np.random.default_rng(abs(lora.seed or 0))
        a = random.uniform(-0.25, 0.25, size=(lora.rank, HIDDEN)).astype(np.float32)
        return cls(lora=lora, a=a, b=np.zeros((VOCAB_SIZE, lora.rank), np.float32))

    def copy(self) -> FakeAdapter:
        """The same state, which no training of this one changes."""
        gradient = None if self.gradient is None else (self.gradient[0].copy(), self.gradient[1].copy())
        moments = [moment.copy() for moment in self.moments]
        return attrs.evolve(self, a=self.a.copy(), b=self.b.copy(), gradient=gradient, moments=moments)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.lora.alpha / self.lora.rank


def log_softmax(logits: Array) -> Array:
    """Row-wise log-probabilities ``[T, V]``."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def next_token_logprobs(base: FakeBase, adapter: FakeAdapter | None, tokens: npt.NDArray[np.int32]) -> Array:
    """Log-probabilities ``[T, VOCAB_SIZE]`` of what follows each token."""
    hidden = base.embedding[tokens]
    logits = hidden @ base.unembed.T
    if adapter is not None:
        logits = logits + adapter.scale * (hidden @ adapter.a.T) @ adapter.b.T
    return log_softmax(logits)


class FakeHandle:
    """What the fake sampler gets from the fake trainer."""

    def __init__(self, trainer: FakeTrainer) -> None:
        self._trainer = trainer
        self.base = trainer.base

    @property
    def capabilities(self) -> TrainerCapabilities:
        """The trainer's capabilities."""
        return self._trainer.capabilities()

    def copy_adapter(self, ref: WeightsRef) -> FakeAdapter:
        """A frozen copy of a live model or of saved weights."""
        if ref.transport is Transport.IN_PROCESS:
            live = self._trainer.adapter(ref.model_id or "")
            return FakeAdapter(lora=live.lora, a=live.a.copy(), b=live.b.copy())
        return read_adapter(Path(ref.directory or ""), self._trainer.context.base_model.name)

    def capture_adapter(self, adapter: FakeAdapter) -> StateWriter:
        """The copy never changes and is whole in every rank, so that nothing is to be collected."""
        if self._trainer.context.rank != 0:
            return lambda directory: None
        name = self._trainer.context.base_model.name
        return lambda directory: write_adapter(adapter, Path(directory), name, CheckpointType.SAMPLER)


def write_adapter(
    adapter: FakeAdapter,
    directory: Path,
    base_model: str,
    kind: CheckpointType,
    parts: SnapshotParts = WEIGHTS_ONLY,
) -> None:
    """An adapter into a directory, as numpy files."""
    np.savez(directory / "weights.npz", adapter.a, adapter.b)
    if parts.optimizer:
        np.savez(directory / "optimizer.npz", *adapter.moments)
    if parts.gradient:
        np.savez(directory / "gradient.npz", *(adapter.gradient or ()))
    manifest = CheckpointManifest(
        kind=kind, base_model=base_model, lora_config=adapter.lora, optimizer_steps=adapter.num_steps
    )
    (directory / "tinker.json").write_text(json.dumps(make_converter().unstructure(manifest)))


def read_adapter(directory: Path, base_model: str, parts: SnapshotParts = WEIGHTS_ONLY) -> FakeAdapter:
    """An adapter from a directory; raises `CheckpointMismatchError` for another base model or files that do not fit."""
    try:
        manifest = make_converter().structure(json.loads((directory / "tinker.json").read_text()), CheckpointManifest)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointMismatchError(f"{directory}/tinker.json is not a checkpoint manifest: {error}") from error
    if manifest.base_model != base_model:
        raise CheckpointMismatchError(f"the checkpoint is of base model {manifest.base_model!r}, not {base_model!r}")
    rank = manifest.lora_config.rank
    pair = ((rank, HIDDEN), (VOCAB_SIZE, rank))
    a, b = _read_arrays(directory / "weights.npz", pair)
    adapter = FakeAdapter(lora=manifest.lora_config, a=a, b=b)
    if parts.optimizer:
        adapter.num_steps = manifest.optimizer_steps
        adapter.moments = _read_arrays(directory / "optimizer.npz", (*pair, *pair) if adapter.num_steps else ())
    if parts.gradient:
        gradient = _read_arrays(directory / "gradient.npz", pair, ())
        adapter.gradient = (gradient[0], gradient[1]) if gradient else None
    return adapter


def _read_arrays(path: Path, *allowed: tuple[tuple[int, int], ...]) -> list[Array]:
    """Float32 arrays of one of the allowed lists of shapes."""
    try:
        with np.load(path) as file:
            arrays = [file[name] for name in file.files]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointMismatchError(f"{path} cannot be read: {error}") from error
    if tuple(array.shape for array in arrays) not in allowed or any(array.dtype != np.float32 for array in arrays):
        raise CheckpointMismatchError(f"{path} holds {[(array.shape, array.dtype) for array in arrays]}")
    return arrays


class FakeTrainer:
    """Implements `tinker_core.interfaces.Trainer` over `FakeBase`; losses: cross_entropy and importance_sampling."""

    def __init__(self, context: RankContext) -> None:
        self.context = context
        self.base = FakeBase()
        self._models: dict[str, FakeAdapter] = {}

    def capabilities(self) -> TrainerCapabilities:
        """A small text model."""
        return TrainerCapabilities(
            losses=tuple(FAKE_LOSSES),
            optimizers=(ADAMW_FAMILY,),
            max_lora_rank=self.context.max_lora_rank,
            max_models=self.context.max_models,
            max_context_length=self.context.max_context_length or CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            transports=(Transport.IN_PROCESS, Transport.SHARED_MEMORY, Transport.FILE),
            offers_model_handle=True,
            architecture="fake",
        )

    def adapter(self, model_id: str) -> FakeAdapter:
        """A live model."""
        if model_id not in self._models:
            raise UnknownModelError(model_id)
        return self._models[model_id]

    def create(self, model: PreparedModel) -> None:
        """Make a model."""
        config, rank = model.lora_config, model.lora_config.rank
        if not (config.train_attn or config.train_mlp or config.train_unembed or config.target_modules):
            raise InvalidLoraConfigError("lora_config adapts nothing; set one of its train_* flags")
        if not 1 <= rank <= self.context.max_lora_rank:
            raise InvalidLoraConfigError(f"lora rank {rank} must be 1 to {self.context.max_lora_rank}")
        require_family(model.optimizer_config.type, (ADAMW_FAMILY,))
        read_numbers(model.optimizer_config.settings, {}, "optimizer_config")
        if len(self._models) >= self.context.max_models:
            raise CapacityError(f"all {self.context.max_models} model slots are taken; raise --max-models")
        self._models[model.model_id] = FakeAdapter.fresh(model.lora_config)

    def forward_backward(self, batch: PreparedModelPassBatch) -> Generator[None, None, tuple[ModelPassResult, ...]]:
        """One micro-pass per datum."""
        results = []
        for request in batch.requests:
            try:
                output, gradient = yield from self._pass(request)
            except (TinkerError, RuntimeError) as error:
                results.append(ModelPassResult(request_id=request.request_id, error=describe_error(error)))
                continue
            if not request.forward_only:
                self._accumulate(self.adapter(request.model_id), gradient)
            results.append(ModelPassResult(request_id=request.request_id, output=output))
        return tuple(results)

    def _accumulate(self, adapter: FakeAdapter, gradient: tuple[Array, Array]) -> None:
        old = adapter.gradient
        adapter.gradient = gradient if old is None else (old[0] + gradient[0], old[1] + gradient[1])

    def _pass(
        self, request: PreparedModelPass
    ) -> Generator[None, None, tuple[ForwardBackwardOutput, tuple[Array, Array]]]:
        adapter = self.adapter(request.model_id)
        limits = PassLimits(vocab_size=VOCAB_SIZE, max_context_length=self.capabilities().max_context_length)
        check_pass(request, FAKE_LOSSES, limits)
        grad_a, grad_b = np.zeros_like(adapter.a), np.zeros_like(adapter.b)
        outputs, total = [], 0.0
        for datum in request.data:
            tokens = datum.model_input.text_tokens()
            targets = datum.loss_fn_inputs["target_tokens"].to_numpy().astype(np.int64)
            logprobs = next_token_logprobs(self.base, adapter, tokens)
            chosen = logprobs[np.arange(tokens.size), targets]
            loss, slope = self._loss(request.loss_fn, datum, chosen)
            total += loss
            outputs.append({"logprobs": TensorData.from_numpy(chosen)})
            grad_logits = -np.exp(logprobs) * slope[:, None]
            grad_logits[np.arange(tokens.size), targets] += slope
            hidden = self.base.embedding[tokens]
            grad_b += adapter.scale * grad_logits.T @ (hidden @ adapter.a.T)
            grad_a += adapter.scale * (grad_logits @ adapter.b).T @ hidden
            yield
        if not (np.isfinite(total) and np.isfinite(grad_a).all() and np.isfinite(grad_b).all()):
            raise NonFiniteError("the loss or its gradient is not finite; nothing was added")
        metrics = {"loss:sum": float(total)}
        return ForwardBackwardOutput(loss_fn_outputs=tuple(outputs), metrics=metrics), (grad_a, grad_b)

    def _loss(self, name: str, datum: Datum, chosen: Array) -> tuple[float, Array]:
        """The loss of one datum and its slope with respect to each logprob."""
        inputs = datum.loss_fn_inputs
        if name == "cross_entropy":
            weights = inputs["weights"].to_numpy().astype(np.float32) if "weights" in inputs else np.ones_like(chosen)
            return float(-(weights * chosen).sum()), -weights
        if name == "importance_sampling":
            old = inputs["logprobs"].to_numpy().astype(np.float32)
            advantages = inputs["advantages"].to_numpy().astype(np.float32)
            slope = -np.exp(chosen - old) * advantages
            return float(slope.sum()), slope
        assert name == FAILING_LOSS
        raise RuntimeError("this loss fails in backward")

    def optim_step(self, steps: Sequence[PreparedOptimStep]) -> tuple[OptimStepResult, ...]:
        """AdamW in numpy."""
        return tuple(self._step(step) for step in steps)

    def _step(self, step: PreparedOptimStep) -> OptimStepResult:
        try:
            adapter = self.adapter(step.model_id)
            check_step_family(ADAMW_FAMILY, step.adam_params, step.optimizer_params)
            assert step.adam_params is not None
        except TinkerError as error:
            return OptimStepResult(request_id=step.request_id, error=describe_error(error))
        norm = _adam(adapter, step.adam_params)
        return OptimStepResult(request_id=step.request_id, output=OptimStepOutput(metrics={"grad_norm": norm}))

    def capture(self, model_id: str, parts: SnapshotParts) -> StateWriter:
        """Weights, moments and gradient."""
        return self._capture(model_id, CheckpointType.TRAINING, parts)

    def capture_weights(self, model_id: str) -> StateWriter:
        """Weights only."""
        return self._capture(model_id, CheckpointType.SAMPLER, WEIGHTS_ONLY)

    def _capture(self, model_id: str, kind: CheckpointType, parts: SnapshotParts) -> StateWriter:
        adapter = self.adapter(model_id).copy()
        if self.context.rank != 0:
            return lambda directory: None
        return lambda directory: write_adapter(adapter, Path(directory), self.context.base_model.name, kind, parts)

    def restore(self, model_id: str, directory: str, parts: SnapshotParts) -> None:
        """The state of `capture`."""
        adapter = self.adapter(model_id)
        saved = read_adapter(Path(directory), self.context.base_model.name, parts)
        if saved.lora.rank != adapter.lora.rank:
            raise CheckpointMismatchError(f"the checkpoint has rank {saved.lora.rank}, the model {adapter.lora.rank}")
        self._models[model_id] = attrs.evolve(saved, lora=adapter.lora)

    def unload(self, model_id: str) -> None:
        """Forget a model."""
        self._models.pop(model_id, None)

    def model_handle(self) -> Any:  # noqa: ANN401 - FakeSampler alone understands it
        """The bigram itself."""
        return FakeHandle(self)

    def close(self) -> None:
        """Nothing to release."""


def _adam(adapter: FakeAdapter, params: AdamParams) -> float:
    grads = adapter.gradient or (np.zeros_like(adapter.a), np.zeros_like(adapter.b))
    norm = float(np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads)))
    if params.grad_clip_norm > 0 and norm > params.grad_clip_norm:
        factor = np.float32(params.grad_clip_norm / norm)
        grads = (grads[0] * factor, grads[1] * factor)
    if not adapter.moments:
        adapter.moments = [np.zeros_like(g) for g in (*grads, *grads)]
    adapter.num_steps += 1
    rows = (adapter.a, adapter.b)
    for i, (row, grad) in enumerate(zip(rows, grads, strict=True)):
        first = adapter.moments[i] = adapter.moments[i] * params.beta1 + grad * (1 - params.beta1)
        second = adapter.moments[i + 2] = adapter.moments[i + 2] * params.beta2 + grad**2 * (1 - params.beta2)
        mean = first / (1 - params.beta1**adapter.num_steps)
        spread = np.sqrt(second / (1 - params.beta2**adapter.num_steps)) + params.eps
        updated = row * (1 - params.learning_rate * params.weight_decay) - params.learning_rate * mean / spread
        row[...] = updated
    adapter.gradient = None
    return norm


def _build_trainer(context: RankContext, parts: TrainerParts) -> Trainer:
    del parts
    return FakeTrainer(context)


@hookimpl
def tinker_register_trainer(register: Callable[[TrainerPlugin], None]) -> None:
    """Register the trainer ``fake``."""
    register(TrainerPlugin(name="fake", build=_build_trainer))


@hookimpl
def tinker_register_sampler(register: Callable[[SamplerPlugin], None]) -> None:
    """Register the sampler ``fake``."""
    from tinker_core.testing.fake_sampler import build_sampler

    register(SamplerPlugin(name="fake", placement=Placement.WITH_TRAINER, build_in_rank=build_sampler))


FAKE_PLUGIN = "tinker_core.testing.fakes"
"""The module name under which `Plugins.load` finds the fakes."""
