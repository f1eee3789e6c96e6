"""The closed vocabularies of the API."""

from __future__ import annotations

from enum import StrEnum

__all__ = [
    "CheckpointType",
    "Placement",
    "RequestType",
    "SamplerSaveKind",
    "StopReason",
    "TensorDType",
    "Transport",
]


class RequestType(StrEnum):
    """What a request asks for; the values are stored in records and logs."""

    CREATE_MODEL = "create_model"
    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    OPTIM_STEP = "optim_step"
    SAVE_WEIGHTS = "save_weights"
    SAVE_WEIGHTS_FOR_SAMPLER = "save_weights_for_sampler"
    LOAD_WEIGHTS = "load_weights"
    SAMPLE = "sample"
    CREATE_CUSTOM_LOSS = "create_custom_loss"


class CheckpointType(StrEnum):
    """Kind of a saved checkpoint; the value is the middle segment of its tinker path."""

    TRAINING = "weights"
    SAMPLER = "sampler_weights"


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
    OBJECT_STORE = "object_store"
    NCCL = "nccl"


class Placement(StrEnum):
    """Where a sampler runs."""

    OWN = "own"
    """In processes of its own; it never waits for training."""
    WITH_TRAINER = "with_trainer"
    """Inside every trainer rank, on the trainer's own base weights."""
