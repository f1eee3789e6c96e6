"""The closed vocabularies of the API."""

from __future__ import annotations

from enum import StrEnum

__all__ = [
    "CheckpointType",
    "CustomLossOp",
    "Placement",
    "RequestType",
    "SamplerSaveKind",
    "StopReason",
    "TensorDType",
    "Transport",
    "UsageKind",
]


class RequestType(StrEnum):
    """What a request asks for; the values are stored in records and logs."""

    CREATE_MODEL = "create_model"
    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    OPTIM_STEP = "optim_step"
    SAVE_WEIGHTS = "save_weights"
    SAVE_WEIGHTS_FOR_SAMPLER = "save_weights_for_sampler"
    SAVE_WEIGHTS_EXTERNAL = "save_weights_external"
    LOAD_WEIGHTS = "load_weights"
    UNLOAD_MODEL = "unload_model"
    SAMPLE = "sample"
    CREATE_CUSTOM_LOSS = "create_custom_loss"


class CheckpointType(StrEnum):
    """Kind of a saved checkpoint; the value is the middle segment of its tinker path."""

    TRAINING = "weights"
    SAMPLER = "sampler_weights"
    EXTERNAL = "external_weights"
    """PEFT files for use outside, possibly encrypted; never loaded again."""


class CustomLossOp(StrEnum):
    """What a node of a traced custom loss does, in the words of ``torch.fx``."""

    PLACEHOLDER = "placeholder"
    GET_ATTR = "get_attr"
    CALL_FUNCTION = "call_function"
    CALL_METHOD = "call_method"
    CALL_MODULE = "call_module"
    OUTPUT = "output"


class TensorDType(StrEnum):
    """Element types that tensors may have on the wire."""

    FLOAT32 = "float32"
    INT64 = "int64"


class StopReason(StrEnum):
    """Why a generated sequence ended."""

    STOP = "stop"
    """An end-of-sequence token or a stop sequence was produced; it is the last element of the tokens."""
    LENGTH = "length"
    """``max_tokens`` or the context length was reached."""


class SamplerSaveKind(StrEnum):
    """How an ephemeral sampler save behaves when the model is saved again."""

    SNAPSHOT = "snapshot"
    """Frozen for ever."""
    INFLIGHT = "inflight"
    """A target that moves on the next inflight save of the same model."""


class Transport(StrEnum):
    """How adapter weights travel from a trainer to a sampler."""

    IN_PROCESS = "in_process"
    """Trainer and sampler share a process; publishing copies the live row."""
    FILE = "file"
    """A directory in PEFT format."""
    SHARED_MEMORY = "shared_memory"
    """A directory in PEFT format that lies in memory and becomes the sampler's own."""
    OBJECT_STORE = "object_store"
    NCCL = "nccl"


class Placement(StrEnum):
    """Where a sampler runs."""

    OWN = "own"
    """In processes of its own; it never waits for training."""
    WITH_TRAINER = "with_trainer"
    """Inside every trainer rank, on the trainer's own base weights."""


class UsageKind(StrEnum):
    """What is counted in the usage ledger."""

    TRAINING = "training"
    """Tokens of forward and forward_backward passes."""
    PREFILL = "sampling_prefill"
    """Prompt tokens that a sampler computed."""
    CACHED_PREFILL = "sampling_prefill_cached"
    """Prompt tokens that a sampler had computed before."""
    SAMPLE = "sampling_sample"
    """Generated tokens."""
    CHECKPOINT = "checkpoint"
    """Checkpoints saved."""
    STORAGE = "storage"
    """Bytes kept."""
