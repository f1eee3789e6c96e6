"""What is known about models, workers and the engine."""

from __future__ import annotations

import attrs

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
    """Revisions that may be resident at once; the engine spills the least recently used beyond."""
    max_topk: int = 64
    modalities: tuple[str, ...] = ("text",)


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
