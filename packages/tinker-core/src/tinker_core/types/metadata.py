"""What is known about models, workers and the engine."""

from __future__ import annotations

import attrs

from tinker_core.types.agreement import AgreementReport
from tinker_core.types.enums import Transport


@attrs.frozen(kw_only=True)
class BaseModelSpec:
    """One base model that a server hosts."""

    name: str
    """The name clients ask for."""
    path: str
    """Directory or hub name that the weights come from."""
    trainable: bool = True
    sampleable: bool = True


@attrs.frozen(kw_only=True)
class TrainerCapabilities:
    """What a trainer can do with its base model; drives admission and ``get_server_capabilities``."""

    losses: tuple[str, ...]
    optimizers: tuple[str, ...]
    max_lora_rank: int
    max_models: int
    max_context_length: int
    """Tokens of one datum."""
    vocab_size: int
    full_parameter: bool = False
    modalities: tuple[str, ...] = ("text",)
    transports: tuple[Transport, ...] = (Transport.FILE,)
    offers_model_handle: bool = False
    """Whether a sampler of placement WITH_TRAINER can run on this trainer."""
    architecture: str = ""


@attrs.frozen(kw_only=True)
class SamplerCapabilities:
    """What a sampler can do."""

    max_context_length: int
    """Prompt plus generated tokens of one sequence."""
    vocab_size: int
    transports: tuple[Transport, ...]
    max_revisions: int
    """Revisions that may be resident at once; beyond, the engine takes away the least recently used."""
    max_topk: int = 64
    modalities: tuple[str, ...] = ("text",)
    max_lora_rank: int | None = None
    """Greatest rank of an adapter that it can serve; None where whatever the trainer makes can be served."""
    lora_targets: tuple[str, ...] | None = None
    """Last name segments of the linears that an adapter may change; None as above."""


@attrs.frozen(kw_only=True)
class ModelMetadata:
    """A base model as clients see it (SDK ``SupportedModel``)."""

    model_name: str
    max_context_length: int
    trainable: bool
    sampleable: bool


@attrs.frozen(kw_only=True)
class EngineMetrics:
    """Counters and gauges of one base model's queue."""

    base_model: str
    queued_requests: int
    running_requests: int
    resident_models: int
    resident_revisions: int
    completed_requests: int
    failed_requests: int
    samples_in_progress: int = 0
    """Samples accepted and not finished; they are in no queue of the engine."""
    trained_tokens: int = 0
    """Tokens of finished passes, with and without gradient."""
    prefilled_tokens: int = 0
    """Prompt tokens of finished samples, computed and cached."""
    sampled_tokens: int = 0
    oldest_queued_seconds: float = 0.0
    """How long the training request that has waited longest has waited."""
    stored_revisions: int = 0
    """Weights of unfinished sessions that the sampler can read from disk."""
    stored_revision_bytes: int = 0
    parked_models: int = 0
    """Live models that are on disk and not in memory."""
    samples_waiting: int = 0
    """Those of the samples in progress that have not begun."""
    worker_losses: int = 0
    """How often the workers died unasked."""
    recovery_seconds: float = 0.0
    """From the last such death until its models could work again."""
    agreement: AgreementReport | None = None
    """What the last comparison of trainer and sampler found."""


@attrs.frozen(kw_only=True)
class DurabilityMetrics:
    """How far what was promised to clients is from being safe, and how much room there is for it."""

    journal_bytes: int = 0
    """Bytes of requests and results in the journal."""
    journal_max_bytes: int = 0
    journal_requests: int = 0
    """Accepted requests without a result."""
    journal_results: int = 0
    """Results kept."""
    journal_waiting: int = 0
    """Appends that are not durable yet."""
    journal_waiting_seconds: float = 0.0
    """How long the oldest of them has waited."""
    journal_commits: int = 0
    """Transactions of this process."""
    journal_full: bool = False
    """Whether the journal takes no more requests."""
    snapshot_lag_seconds: float = 0.0
    """Age of the oldest change to a model that no snapshot covers."""
    snapshot_lag_requests: int = 0
    """Requests that would run again after a crash, of all models."""
    snapshots_written: int = 0
    snapshots_failed: int = 0
