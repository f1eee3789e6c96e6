"""The commands between a sampler and its engine processes, on this machine and on others alike."""

from __future__ import annotations

from typing import Any

import attrs

from tinker_core.encoding import Nothing
from tinker_core.executors.protocol import CancelCall, RetireCall, WaitingCall
from tinker_core.types import BaseModelSpec, PreparedSample, SampleOutput, SamplerCapabilities

PROTOCOL_VERSION = 1
"""Both sides must speak the same; `CALL` carries it."""
CHUNK_BYTES = 16 * 1024**2
"""Most bytes of a file in one `PutCall`: other commands pass between two of them."""
MAX_CALL_BYTES = 64 * 1024**2
"""An engine on another machine ends connections with larger commands: the size is claimed before anybody has shown who
they are."""


@attrs.frozen(kw_only=True)
class EngineSettings:
    """What an engine process is told when it starts."""

    base_model: BaseModelSpec
    device: str
    """``"cpu"`` or ``"cuda"``."""
    dtype: str
    max_revisions: int = 64
    """Adapters and full weights that the engine holds at once, all of them in host memory."""
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
    """The first call on a connection: from now on the engine works for it, and forgets what others gave it."""

    server: str
    """Stays the same when the server starts again, so that it takes its own engines back at once."""
    base_model: str
    dtype: str
    deterministic: bool = False
    """What the engine must serve, or else it refuses and stays with whoever has it."""


@attrs.frozen(kw_only=True)
class PutCall:
    """A piece of a file of weights, for an engine that does not share the sampler's machine; `LoadCall` follows."""

    revision: str
    name: str
    """File name without a directory."""
    offset: int
    data: bytes = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class LoadCall:
    """Weights to hold under an immutable name."""

    revision: str
    full: bool = False
    """All weights of a model like the base model, as safetensors, and not a PEFT adapter."""
    directory: str | None = None
    """Where they are, on a machine that both share; None for those that `PutCall`s have brought."""


METHODS: dict[str, tuple[Any, Any]] = {
    "claim": (ClaimCall, EngineDescription),
    "release": (Nothing, Nothing),
    "put": (PutCall, Nothing),
    "load": (LoadCall, Nothing),
    "retire": (RetireCall, Nothing),
    "sample": (PreparedSample, SampleOutput),
    "cancel": (CancelCall, Nothing),
    "is_waiting": (WaitingCall, bool),
    "health": (Nothing, Nothing),
}
"""Payload and answer type of every command."""

CALL = b"call %d" % PROTOCOL_VERSION
RESULT, ERROR = b"result", b"error"
READY, FAILED = b"ready", b"failed"
"""How the start of an engine process ended, as its first word to its parent."""
