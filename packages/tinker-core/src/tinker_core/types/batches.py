"""Work as the engine hands it to trainers and samplers: checked, ordered, with every random choice drawn."""

from __future__ import annotations

import attrs

from tinker_core.types.custom_loss import CustomLoss
from tinker_core.types.enums import CheckpointType, Transport
from tinker_core.types.model_input import Datum
from tinker_core.types.params import AdamParams, LoraConfig, OptimizerConfig
from tinker_core.types.requests import (
    ForwardBackwardOutput,
    JsonObject,
    OptimStepOutput,
    RequestError,
    SampleInput,
    SampleOutput,
)


@attrs.frozen(kw_only=True)
class PreparedModel:
    """A model to create in every trainer rank; the LoRA seed is drawn."""

    model_id: str
    lora_config: LoraConfig
    optimizer_config: OptimizerConfig


@attrs.frozen(kw_only=True)
class PreparedModelPass:
    """One request's share of a pass."""

    request_id: str
    model_id: str
    data: tuple[Datum, ...]
    loss_fn: str
    loss_fn_config: dict[str, float | str] = attrs.field(factory=dict)
    forward_only: bool = False
    custom_loss: CustomLoss | None = None
    """The graph to run when ``loss_fn`` is ``custom``."""


@attrs.frozen(kw_only=True)
class PreparedModelPassBatch:
    """A pass over data of several models at once; at most one request per model."""

    requests: tuple[PreparedModelPass, ...]


@attrs.frozen(kw_only=True)
class ModelPassResult:
    """Result or error of one request of a pass; exactly one is set."""

    request_id: str
    output: ForwardBackwardOutput | None = None
    error: RequestError | None = None


@attrs.frozen(kw_only=True)
class PreparedOptimStep:
    """One model's optimizer step."""

    request_id: str
    model_id: str
    adam_params: AdamParams | None = None
    optimizer_params: JsonObject | None = None


@attrs.frozen(kw_only=True)
class OptimStepResult:
    """Result or error of one step; exactly one is set."""

    request_id: str
    output: OptimStepOutput | None = None
    error: RequestError | None = None


@attrs.frozen(kw_only=True)
class WeightsRef:
    """Adapter weights by name of transport, so that they can move without passing through the engine."""

    transport: Transport
    model_id: str | None = None
    """IN_PROCESS: the live model to copy."""
    directory: str | None = None
    """FILE and SHARED_MEMORY: an absolute directory in PEFT format."""


@attrs.frozen(kw_only=True)
class SnapshotParts:
    """Which parts of a model's state to write."""

    optimizer: bool = True
    gradient: bool = False
    """The accumulated gradient that no optim_step has consumed yet."""


MANIFEST_FILE = "tinker.json"
"""The file of a checkpoint directory that holds a `CheckpointManifest`."""


@attrs.frozen(kw_only=True)
class CheckpointManifest:
    """What ``tinker.json`` in a checkpoint directory says."""

    kind: CheckpointType
    base_model: str
    lora_config: LoraConfig
    optimizer_config: OptimizerConfig = OptimizerConfig()
    optimizer_steps: int = 0
    format_version: int = 1


@attrs.frozen(kw_only=True)
class PreparedSample:
    """One sample request for one revision; revision None means the bare base model. The seed is drawn."""

    request_id: str
    revision: str | None
    request: SampleInput


@attrs.frozen(kw_only=True)
class PreparedSampleBatch:
    """Sample requests that became known together; each still completes alone."""

    samples: tuple[PreparedSample, ...]


@attrs.frozen(kw_only=True)
class SampleResult:
    """Result or error of one sample request; exactly one is set."""

    request_id: str
    output: SampleOutput | None = None
    error: RequestError | None = None
