"""The commands between a sampler and its engine processes, on this machine and on others alike."""

from __future__ import annotations

from typing import Any

import attrs

from tinker_core.encoding import Nothing
from tinker_core.executors.protocol import CancelCall, RetireCall, WaitingCall
from tinker_core.types import BaseModelSpec, PreparedSample, SampleOutput, SamplerCapabilities

PROTOCOL_VERSION = 1
"""Both sides must speak the same; `ClaimCall` carries it."""


@attrs.frozen(kw_only=True)
class EngineSettings:
    """What an engine process is told when it starts."""

    base_model: BaseModelSpec
    device: str
    """``"cpu"`` or ``"cuda"``."""
    dtype: str
    max_revisions: int = 64
    """Adapters that the engine holds at once, in host memory."""
    max_lora_rank: int = 128
    lora_slots: int = 8
    """Different adapters of one batch; each slot takes device memory for an adapter of the greatest rank."""
    max_context_length: int | None = None
    max_decode_batch: int = 64
    """Most sequences that are decoded together."""
    deterministic: bool = False
    tensor_parallel: int = 1
    memory_share: float | None = None
    """Share of the device's memory for weights and KV cache; None leaves it to vLLM."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache; None fills ``memory_share``, or takes a default on CPUs."""
    eager: bool | None = None
    """Whether vLLM compiles nothing and captures no graphs; None does so on CPUs only."""


@attrs.frozen(kw_only=True)
class EngineDescription:
    """What an engine process says of itself."""

    capabilities: SamplerCapabilities
    base_model: str
    dtype: str
    vllm_version: str
    incarnation: str
    """Another for each start of an engine; what an earlier one held is gone."""


@attrs.frozen(kw_only=True)
class ClaimCall:
    """The first call of a sampler: from now on the engine works for it, and forgets what others gave it."""

    server: str
    """Stays the same when the server starts again, so that it takes its own engines back at once."""
    client: str
    """Another for each start of the sampler."""
    version: int = PROTOCOL_VERSION


@attrs.frozen(kw_only=True)
class LoadCall:
    """Weights to hold under an immutable name."""

    revision: str
    full: bool = False
    """All weights of a model like the base model, as safetensors, and not a PEFT adapter."""
    directory: str | None = None
    """Where they are, on a machine that both share."""
    files: dict[str, bytes] = attrs.field(factory=dict, repr=False)
    """Otherwise the files themselves, by name."""


METHODS: dict[str, tuple[Any, Any]] = {
    "claim": (ClaimCall, EngineDescription),
    "load": (LoadCall, Nothing),
    "retire": (RetireCall, Nothing),
    "sample": (PreparedSample, SampleOutput),
    "cancel": (CancelCall, Nothing),
    "is_waiting": (WaitingCall, bool),
    "health": (Nothing, Nothing),
}
"""Payload and answer type of every command."""

CALL, RESULT, ERROR, READY, FAILED, STOP = b"call", b"result", b"error", b"ready", b"failed", b"stop"
