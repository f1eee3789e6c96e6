"""What clients ask for and what they get: one input and one output record per operation."""

from __future__ import annotations

import attrs

from tinker_core.errors import Category
from tinker_core.types.custom_loss import CustomLoss
from tinker_core.types.enums import RequestType, SamplerSaveKind, StopReason
from tinker_core.types.model_input import Datum, ModelInput
from tinker_core.types.params import AdamParams, LoraConfig, OptimizerConfig, SamplingParams
from tinker_core.types.tensors import TensorData

JsonObject = dict[str, object]


@attrs.frozen(kw_only=True)
class RequestError:
    """Why a request failed, as its future reports it."""

    category: Category
    code: str
    """Name of the class in `tinker_core.errors`, or of the unexpected exception."""
    message: str


# --- models -----------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class CreateModelInput:
    """A new adapter on a base model; its id will be ``{session_id}:train:{model_seq_id}``."""

    session_id: str
    model_seq_id: int
    base_model: str
    lora_config: LoraConfig
    optimizer_config: OptimizerConfig = OptimizerConfig()
    user_metadata: JsonObject | None = None


@attrs.frozen(kw_only=True)
class CreateModelOutput:
    """The id of the model that is now ready to train."""

    model_id: str


# --- passes and steps -------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class ForwardBackwardInput:
    """A pass of one model over some data; its gradient is added to what the model has accumulated."""

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss_fn: str
    loss_fn_config: dict[str, float | str] = attrs.field(factory=dict)
    forward_only: bool = False
    """Compute logprobs and loss, and leave the gradient alone."""
    custom_loss: CustomLoss | None = None
    """What ``loss_fn_config["loss_id"]`` names when ``loss_fn`` is ``custom``; filled in by the engine."""


@attrs.frozen(kw_only=True)
class ForwardBackwardOutput:
    """What a pass computed, before any update."""

    loss_fn_outputs: tuple[dict[str, TensorData], ...]
    """One dict per datum, in order; always ``logprobs``, float32 in the layout of the datum's target_tokens."""
    metrics: dict[str, float]
    """``name:reducer`` keys; always ``loss:sum``."""
    loss_fn_output_type: str = "ArrayRecord"


@attrs.frozen(kw_only=True)
class OptimStepInput:
    """Apply and clear the accumulated gradient of one model."""

    model_id: str
    seq_id: int
    adam_params: AdamParams | None = None
    """The step's parameters when the client speaks of Adam, else None."""
    optimizer_params: JsonObject | None = None
    """The step's parameters of any other family, with its ``type``."""


@attrs.frozen(kw_only=True)
class OptimStepOutput:
    """What a step reports: ``grad_norm`` before clipping, and what the optimizer adds."""

    metrics: dict[str, float]


# --- weights ----------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class SaveWeightsInput:
    """Save a training checkpoint: weights and optimizer state."""

    model_id: str
    seq_id: int
    path: str
    """The checkpoint's bare name, for example ``"step-5"``."""
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: JsonObject | None = None


@attrs.frozen(kw_only=True)
class SaveWeightsForSamplerInput:
    """Save weights for sampling: under a name, or ephemeral when ``path`` is None."""

    model_id: str
    seq_id: int
    path: str | None = None
    sampling_session_seq_id: int | None = None
    """Set for ephemeral saves: the number of the sampling session that the save opens."""
    kind: SamplerSaveKind = SamplerSaveKind.SNAPSHOT
    ttl_seconds: int | None = None
    user_metadata: JsonObject | None = None


@attrs.frozen(kw_only=True)
class SaveWeightsExternalInput:
    """Save an adapter as the files that PEFT reads, for use outside."""

    model_id: str
    seq_id: int
    path: str
    """The checkpoint's bare name."""
    ttl_seconds: int | None = None
    age_encryption_recipients: tuple[str, ...] = ()
    """age recipients, native ``age1…`` keys or SSH public keys, that every file is encrypted to; none means plain."""


@attrs.frozen(kw_only=True)
class SaveWeightsOutput:
    """Where the weights went: a tinker path for named saves, a sampling session for ephemeral ones."""

    path: str | None = None
    sampling_session_id: str | None = None


@attrs.frozen(kw_only=True)
class LoadWeightsInput:
    """Load a training checkpoint, into an existing model or into a new one ("create via load")."""

    path: str
    """The tinker path to load."""
    optimizer: bool
    """Restore the optimizer state too; otherwise the moments start fresh."""
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    optimizer_config: OptimizerConfig | None = None
    user_metadata: JsonObject | None = None
    weights_access_token: str | None = attrs.field(default=None, repr=False)
    """Opens one checkpoint, or one run, of another owner."""


@attrs.frozen(kw_only=True)
class LoadWeightsOutput:
    """The path that was loaded and the model that holds it."""

    path: str
    model_id: str


@attrs.frozen(kw_only=True)
class UnloadModelInput:
    """Release a model once its accepted work is done; its saved checkpoints stay."""

    model_id: str


@attrs.frozen(kw_only=True)
class UnloadModelOutput:
    """The id of the model that is gone."""

    model_id: str


# --- sampling ---------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class CreateSamplingSessionInput:
    """Open a sampling session on a base model or on saved weights; exactly one of the two is set."""

    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


@attrs.frozen(kw_only=True)
class SampleInput:
    """Generate from a prompt and report what was asked about it (SDK ``SamplingClient.sample``)."""

    sampling_session_id: str
    seq_id: int
    prompt: ModelInput
    sampling_params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: TensorData | None = None
    """int64 ``[P - 1, K]``, dense or CSR: token ids whose logprob is wanted at positions 1..P-1; -1 skips a cell."""


EMPTY_LOGPROB = -99999.0
"""Logprob of an empty cell of a top-k table; its token is 0."""


@attrs.frozen(kw_only=True)
class TopkLogprobs:
    """The k likeliest tokens at each of n positions, likeliest first; an empty cell is 0 with `EMPTY_LOGPROB`."""

    token_ids: TensorData
    """int64 ``[n, k]``."""
    logprobs: TensorData
    """float32 ``[n, k]``."""


@attrs.frozen(kw_only=True)
class PromptAltTokens:
    """k independent draws, with replacement and at the request's temperature, at each of the positions 1..P-1."""

    tokens: TensorData
    """int64 ``[P - 1, k]``."""
    logprobs: TensorData
    """float32 ``[P - 1, k]``."""


@attrs.frozen(kw_only=True)
class GeneratedSequence:
    """One sampled continuation; a stop token, if one ended it, is its last element."""

    stop_reason: StopReason
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The model's own log-probabilities of ``tokens``: before temperature, top-k and top-p."""
    topk_logprobs: TopkLogprobs | None = None
    """``[len(tokens), k]`` when asked for."""


@attrs.frozen(kw_only=True)
class SampleOutput:
    """Everything a sample request produced."""

    sequences: tuple[GeneratedSequence, ...]
    prompt_logprobs: TensorData | None = None
    """float32 ``[P]``; element 0, and all before ``prompt_logprobs_last_n``, are NaN."""
    topk_prompt_logprobs: TopkLogprobs | None = None
    """``[P, k]``, row i describes position i; row 0 is empty."""
    target_prompt_logprobs: TensorData | None = None
    """float32 in the layout of the request; 0.0 where it was -1."""
    prompt_alt_tokens: PromptAltTokens | None = None
    prompt_cache_hit_tokens: int = 0


@attrs.frozen(kw_only=True)
class CreateCustomLossInput:
    """Register a traced loss for a session (SDK flag ``custom_loss_server_side``)."""

    session_id: str
    custom_loss_seq_id: int
    loss: CustomLoss
    loss_id: str | None = None
    """Its name, drawn when the request is accepted."""


@attrs.frozen(kw_only=True)
class CreateCustomLossOutput:
    """The name by which passes of the same session ask for the loss."""

    loss_id: str


# --- futures ----------------------------------------------------------------------------------------------------------

EngineRequest = (
    CreateModelInput
    | ForwardBackwardInput
    | OptimStepInput
    | SaveWeightsInput
    | SaveWeightsForSamplerInput
    | SaveWeightsExternalInput
    | LoadWeightsInput
    | UnloadModelInput
    | SampleInput
    | CreateCustomLossInput
)
"""Every request that is answered by a future."""

EngineOutput = (
    CreateModelOutput
    | CreateCustomLossOutput
    | ForwardBackwardOutput
    | OptimStepOutput
    | SaveWeightsOutput
    | LoadWeightsOutput
    | UnloadModelOutput
    | SampleOutput
    | RequestError
)
"""Every value that a future can resolve to."""


@attrs.frozen(kw_only=True)
class AcceptedRequest:
    """The receipt for a request (SDK "untyped future")."""

    request_id: str
    request_type: RequestType
    model_id: str | None = None
    sample_sequence_ids: tuple[str, ...] | None = None
    """One id per sequence of a sample request."""
