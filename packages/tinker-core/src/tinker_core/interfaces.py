"""What plugins implement.

Trainers and rank samplers live in worker processes, one instance per rank.  Every rank gets the same calls in the same
order; rank 0's results are the ones that count.  Samplers of placement OWN live beside the engine.  Nothing here knows
of HTTP, request order, idempotency or owners.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from tinker_core.types import (
    BaseModelSpec,
    EncodedTextChunk,
    ModelInputChunk,
    ModelPassResult,
    OptimStepResult,
    Placement,
    PreparedModel,
    PreparedModelPassBatch,
    PreparedOptimStep,
    PreparedSample,
    SampleOutput,
    SamplerCapabilities,
    SampleResult,
    SettingValue,
    SnapshotParts,
    TrainerCapabilities,
    WeightsRef,
)

if TYPE_CHECKING:
    import torch

OptionValue = str | int | float | bool


@attrs.frozen(kw_only=True)
class Option:
    """One setting of a plugin, shown as a flag by ``tinker-server``."""

    name: str
    """With dashes, without the leading ones, for example ``"tensor-parallel"``."""
    type: type[str] | type[int] | type[float] | type[bool]
    default: OptionValue
    help: str


@attrs.frozen(kw_only=True)
class RankContext:
    """Everything a worker process is told about itself and its base model."""

    base_model: BaseModelSpec
    rank: int
    world_size: int
    rendezvous: str
    """A URL that ``torch.distributed.init_process_group`` takes as ``init_method``."""
    device: str
    """``"cpu"`` or ``"cuda"``; a rank chooses its own index."""
    dtype: str
    """``"float32"`` or ``"bfloat16"``: the base weights and the activations. Adapter rows are always float32."""
    micro_batch_tokens: int = 2048
    """Most tokens of one packed micro-pass; one longer datum goes alone."""
    max_models: int = 64
    max_lora_rank: int = 128
    max_context_length: int | None = None
    """Lower bound than the model's own, or None."""
    max_revisions: int = 64
    max_decode_batch: int = 64
    """Most sequences that a rank sampler decodes together."""
    deterministic: bool = False
    """Equal requests from equal state give equal bits, whatever else the rank does, has done, or holds: each request
    of a pass is computed alone, one sample request is decoded at a time, and no kernel depends on timing."""
    options: Mapping[str, OptionValue] = attrs.field(factory=dict)
    """The plugin's own `Option` values by name."""


class ModelHandle(Protocol):
    """A trainer's live base model, as a rank sampler may use it between micro-passes."""

    @property
    def capabilities(self) -> TrainerCapabilities:
        """What the trainer says of itself."""

    @property
    def model(self) -> torch.nn.Module:
        """The root module, which the sampler ``colocated`` calls as a `tinker_core.sampling.colocated.root.Root`.

        Call it, never a part of it: sharded weights are gathered by the root's hooks.
        """

    @property
    def device(self) -> torch.device:
        """Where the model's activations live."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute type of the model."""

    @property
    def eos_tokens(self) -> frozenset[int]:
        """End-of-sequence ids of the base model; empty when it names none."""

    def copy_adapter(self, ref: WeightsRef) -> object:
        """A frozen copy of adapter weights, in compute type, that no later training changes.

        Raises `UnknownModelError` for an IN_PROCESS reference to no live model and `CheckpointMismatchError` for files
        of another base model.
        """

    def capture_adapter(self, adapter: object) -> StateWriter:
        """Something that writes a copy made by `copy_adapter` as a PEFT directory that ``copy_adapter`` can read again.

        All ranks call this in the same order, and what they hold parts of comes together here: the writer, which runs
        in rank 0 at any later time, can wait for no other rank. The writers of other ranks write nothing.
        """

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's value of a tensor, in every rank; the tensor itself when the world is one rank."""


StateWriter = Callable[[str], None]
"""Writes state that was captured into an existing empty directory. Called once, perhaps on another thread, while the
trainer goes on or has forgotten the model. Raises `StorageError` or `OSError`."""


class Trainer(Protocol):
    """Owns the state of all models on one base model, in one rank.

    State is opaque to the engine.  A method that takes several requests answers each with a result *or* an error; only
    a broken world (a dead peer, a device fault) may raise from them.
    """

    def capabilities(self) -> TrainerCapabilities:
        """What this trainer offers."""

    def create(self, model: PreparedModel) -> None:
        """Make a model: A matrices from the seed, B zero, no gradient, fresh optimizer.

        Raises `InvalidLoraConfigError`, `CapacityError` or `UnsupportedFeatureError`.
        """

    def forward_backward(self, batch: PreparedModelPassBatch) -> Generator[None, None, tuple[ModelPassResult, ...]]:
        """Run a pass over data of several models: yields after each micro-pass, returns a result per request in order.

        Losses are plain sums.  Atomic per model: the gradient is added to what a model has accumulated only after the
        whole pass succeeded.  A pass that raises leaves every row bit-identical and is retried one request at a time; a
        non-finite loss or gradient fails its own request with `NonFiniteError`, committing nothing.
        """

    def optim_step(self, steps: Sequence[PreparedOptimStep]) -> tuple[OptimStepResult, ...]:
        """Apply and clear the accumulated gradients of some models; a step without gradient succeeds."""

    def capture(self, model_id: str, parts: SnapshotParts) -> StateWriter:
        """Copy a model's state into host memory; every collective and every read of the live state happens here.

        The writer makes PEFT weights, ``optimizer.safetensors``, ``gradient.safetensors`` and ``tinker.json``, as
        ``parts`` asks: a part that was asked for has its file, also when nothing is in it. All ranks call this in the
        same order; the writers of ranks other than 0 write nothing.
        """

    def capture_weights(self, model_id: str) -> StateWriter:
        """Copy only a model's weights, for samplers; the writer makes a PEFT directory with ``tinker.json``."""

    def restore(self, model_id: str, directory: str, parts: SnapshotParts) -> None:
        """Put a snapshot into an existing model; without ``parts.optimizer`` the moments start fresh. The gradient is
        cleared unless ``parts.gradient``.

        Names, shapes and types of all that is read are checked. Raises `CheckpointMismatchError` or `StorageError`, in
        all ranks together, and then changes nothing.
        """

    def unload(self, model_id: str) -> None:
        """Forget a model."""

    def model_handle(self) -> ModelHandle | None:
        """The live model for samplers of placement WITH_TRAINER, or None when this trainer has none to offer."""

    def close(self) -> None:
        """Leave the process group and release the device."""


class RankSampler(Protocol):
    """A sampler inside a trainer rank, driven one decode step at a time. Every rank gets the same calls."""

    def capabilities(self) -> SamplerCapabilities:
        """What this sampler offers."""

    def publish(self, revision: str, ref: WeightsRef) -> None:
        """Make weights available under a new immutable name. A name that is already resident is left as it is."""

    def capture_revision(self, revision: str) -> StateWriter:
        """Something that writes a resident revision as a PEFT directory, from which `publish` makes the very same
        weights, also when the revision has been retired meanwhile. The writers of ranks other than 0 write nothing.
        Raises `UnknownCheckpointError`."""

    def retire(self, revision: str) -> None:
        """Drop a revision. Samples in flight keep their weights."""

    def submit(self, sample: PreparedSample) -> None:
        """Queue a sample; its result comes out of a later `step`, errors too."""

    def cancel(self, request_id: str) -> None:
        """Drop a sample that has not finished, freeing its slot at once. Unknown ids are ignored."""

    def is_waiting(self, request_id: str) -> bool:
        """Whether a submitted sample has not begun, for want of a slot. False for unknown ids."""

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""

    def step(self) -> tuple[SampleResult, ...]:
        """Admit what fits, compute one token for every running sequence, and return the requests that ended."""


class Sampler(Protocol):
    """What the engine samples with: a sampler of its own, or the rank samplers of a worker group behind one door."""

    async def start(self) -> None:
        """Become ready to serve; raises when that cannot be."""

    def capabilities(self) -> SamplerCapabilities:
        """What this sampler offers; valid once it has started."""

    async def publish(self, revision: str, ref: WeightsRef) -> None:
        """Make weights available under a new immutable name. A name that is already resident is left as it is.

        A SHARED_MEMORY reference's directory is the sampler's from now on, unless this raises.
        """

    async def save_revision(self, revision: str, directory: str) -> None:
        """Write a resident revision into an existing empty directory, as a PEFT directory from which `publish` makes
        the very same weights."""

    async def retire(self, revision: str) -> None:
        """Drop a revision."""

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        """Generate; raises the request's own error. Cancelling the awaiting task frees the slot."""

    async def is_waiting(self, request_id: str) -> bool:
        """Whether a sample in progress has not begun, for want of a slot. False for unknown ids."""

    async def close(self) -> None:
        """Stop serving."""


# --- plugins ----------------------------------------------------------------------------------------------------------


def count_text_tokens(chunk: ModelInputChunk) -> int:
    """Tokens of a chunk for trainers that take text only; raises `UnsupportedFeatureError` otherwise."""
    from tinker_core.errors import UnsupportedFeatureError

    if not isinstance(chunk, EncodedTextChunk):
        raise UnsupportedFeatureError(f"{type(chunk).__name__} is not supported; this model takes text only")
    return int(chunk.tokens.size)


@attrs.frozen(kw_only=True)
class TrainerPlugin:
    """A trainer by name. ``build`` runs in worker processes only, so heavy imports belong inside it."""

    name: str
    build: Callable[[RankContext, TrainerParts], Trainer]
    count_tokens: Callable[[ModelInputChunk], int] = count_text_tokens
    """Runs in the server process: must stay light."""
    options: tuple[Option, ...] = ()
    choose_ranks: Callable[[int, Mapping[str, OptionValue]], int] | None = None
    """Takes ``--num-ranks`` and option values, and gives the number of ranks to start; raises `ConfigurationError` for
    numbers that do not go together. Runs in the server process: must stay light. None: as many as asked for."""
    check_handle: Callable[[Mapping[str, OptionValue]], None] | None = None
    """Takes option values when a sampler is to run inside the ranks; raises `ConfigurationError` where `model_handle`
    would give None, and says what to change. Runs in the server process, before anything is started: must stay light.
    """


@attrs.frozen(kw_only=True)
class SamplerPlugin:
    """A sampler by name; exactly the builder that fits its placement is set."""

    name: str
    placement: Placement
    build_in_rank: Callable[[RankContext, ModelHandle], RankSampler] | None = None
    """WITH_TRAINER: runs in every trainer rank."""
    build: Callable[[SamplerContext], Sampler] | None = None
    """OWN: runs in the server process, starts processes of its own."""
    options: tuple[Option, ...] = ()
    check: Callable[[BaseModelSpec, str, Mapping[str, OptionValue]], None] | None = None
    """Takes base model, device and option values before anything is started; raises `ConfigurationError` for what
    cannot work, and says what to install or to change. Runs in the server process: must stay light."""


@attrs.frozen(kw_only=True)
class SamplerContext:
    """What a sampler of placement OWN is told."""

    base_model: BaseModelSpec
    device: str
    dtype: str
    directory: str
    """A private directory for sockets; its path is short."""
    memory_directory: str
    """A place in memory for weights; it does not exist yet, and may be left behind."""
    server_id: str
    """Stays the same when the server starts again."""
    max_revisions: int = 64
    max_lora_rank: int = 128
    max_context_length: int | None = None
    """Lower bound than the model's own, or None."""
    max_decode_batch: int = 64
    """Most sequences that are decoded together."""
    deterministic: bool = False
    """Equal requests give equal bits: one sample request is decoded at a time."""
    options: Mapping[str, OptionValue] = attrs.field(factory=dict)


class LossContext(Protocol):
    """What a loss may look at while it works on one datum; all tensors are float32 or int64 and flat ``[N]``.

    N counts the datum's target cells: T for 1-D targets, T*K (or the stored cells, for CSR) for soft targets.
    """

    config: Mapping[str, float | str]

    def input(self, name: str) -> torch.Tensor:
        """A loss input of this datum, float32 ``[N]`` (int64 for ``target_tokens``)."""

    def has_input(self, name: str) -> bool:
        """Whether the datum carries an optional input."""

    def report(self, name: str, value: float | torch.Tensor) -> None:
        """Add to one of the loss's own `LossPlugin.metrics`."""


@attrs.frozen(kw_only=True)
class LossPlugin:
    """A loss by name: a plain sum over the target cells of one datum."""

    name: str
    compute: Callable[[torch.Tensor, LossContext], torch.Tensor]
    """(logprobs ``[N]`` requiring grad, context) -> scalar loss."""
    required_inputs: tuple[str, ...] = ("target_tokens",)
    optional_inputs: tuple[str, ...] = ()
    """Inputs that may be present besides the required ones and ``mask``; any other is refused by name."""
    required_config: tuple[str, ...] = ()
    """Keys without a default: numbers. One that is also an optional input may come as that input in every datum."""
    default_config: Mapping[str, float | str] = attrs.field(factory=dict)
    """Optional keys with their defaults; keys in neither are refused by name."""
    soft_targets: bool = False
    """Whether ``[T, K]`` targets are allowed."""
    per_token: bool = True
    """Whether the loss is a sum of terms that each depend on one target cell only; it may then be computed chunk by
    chunk together with the logits. False: it sees the whole datum at once, at the price of one more matrix product."""
    evaluate: Callable[[torch.Tensor, LossContext], tuple[torch.Tensor, torch.Tensor]] | None = None
    """(logprobs ``[N]``, context) -> scalar loss and its slopes ``[N]``, for a loss that knows its own gradient; else
    the gradient is that of ``compute``."""
    reuses_logits: bool = False
    """For a loss that is not per token: a datum that lies in one chunk is computed together with its logits, without
    that product. Rounding then depends on where chunks end."""
    uses_provenance: bool = False
    """Whether the loss may look at the input ``sampled``: 1 where the datum's provenance says that the target was
    sampled, 0 elsewhere. A datum without provenance does not have this input."""
    metrics: tuple[str, ...] = ()
    """What ``compute`` reports to its context: ``name:sum`` adds up over the data of a request, ``name:mean`` is that
    divided by their number."""
    check_config: Callable[[Mapping[str, float | str]], None] | None = None
    """Raises `InvalidLossConfigError` for values that the loss cannot take; defaults are filled in."""


class FlatOptimizer(Protocol):
    """Optimizer state and update of one model, over flat float32 rows of equal size."""

    def step(self, weights: torch.Tensor, gradient: torch.Tensor, step: PreparedOptimStep) -> dict[str, float]:
        """Update ``weights`` in place from ``gradient`` and return metrics. Does not clear the gradient.

        Raises `InvalidRequestError` for parameters that it cannot honour, before it changes anything.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """Rows by name, each as long as the weights; empty before the first step."""

    @property
    def num_steps(self) -> int:
        """Steps taken."""

    def load(self, rows: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Replace the state by saved rows; raises `CheckpointMismatchError` for rows that cannot be its own."""


@attrs.frozen(kw_only=True)
class OptimizerPlugin:
    """An optimizer family by the ``type`` that clients name."""

    name: str
    build: Callable[[Mapping[str, SettingValue]], FlatOptimizer]
    """Takes `OptimizerConfig.settings`; raises `InvalidRequestError` for what it cannot honour. Each step brings the
    family's own parameters as ``optimizer_params``; `tinker_core.optimizer_families.read_numbers` checks either."""
    build_sharded: Callable[[Mapping[str, SettingValue], Callable[[torch.Tensor], float]], FlatOptimizer] | None = None
    """As ``build``, for rows of which every rank holds a part and steps it alone: the second argument gives the norm of
    a whole row, and all ranks must call it the same number of times. None: trainers that shard rows refuse the family.
    """


@attrs.frozen(kw_only=True)
class TrainerParts:
    """What plugins registered for trainers to use."""

    losses: Mapping[str, LossPlugin]
    optimizers: Mapping[str, OptimizerPlugin]


class WorkerGroup(Protocol):
    """The worker processes of one base model, seen from the engine."""

    async def call(self, method: str, payload: object = None) -> Any:  # noqa: ANN401 - typed per method
        """Run one command in every rank and return rank 0's answer; see `tinker_core.executors.protocol.METHODS`.

        Raises the command's own error, or `WorkerLostError` when a process died.
        """

    @property
    def is_lost(self) -> bool:
        """Whether a process of the group has died unasked; true before any call reports it."""

    async def wait_lost(self) -> str:
        """Return the reason as soon as a process of the group has died unasked."""

    async def close(self) -> None:
        """Stop all processes of the group."""


@attrs.frozen(kw_only=True)
class WorkerGroupSpec:
    """What an executor starts."""

    base_model: BaseModelSpec
    trainer: str
    sampler: str | None
    """The sampler to build inside the ranks; None when the sampler has processes of its own."""
    plugins: tuple[str, ...]
    """Entry-point names to load in the ranks, or ``("*",)`` for all installed."""
    num_ranks: int
    device: str
    dtype: str
    micro_batch_tokens: int = 2048
    max_models: int = 64
    max_lora_rank: int = 128
    max_context_length: int | None = None
    max_revisions: int = 64
    max_decode_batch: int = 64
    deterministic: bool = False
    options: Mapping[str, OptionValue] = attrs.field(factory=dict)
    environment: Mapping[str, str] = attrs.field(factory=dict)
    """Extra environment variables of the rank processes."""


@attrs.frozen(kw_only=True)
class ExecutorPlugin:
    """A way to start worker groups."""

    name: str
    start: Callable[[WorkerGroupSpec], Any]
    """Async: returns a ready `WorkerGroup`, or raises with the ranks' own error."""
