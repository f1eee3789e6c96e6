"""Checks of a sample request against what the sampler can do; every message names the field."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tinker_core.errors import InvalidRequestError
from tinker_core.types import SampleInput, SamplerCapabilities, SamplingParams, TensorData, TensorDType


def check_prompt(request: SampleInput, capabilities: SamplerCapabilities) -> npt.NDArray[np.int64]:
    """The prompt's token ids, int64 ``[P]``; raises `UnsupportedFeatureError` or `InvalidRequestError`."""
    tokens = request.prompt.text_tokens().astype(np.int64)
    if tokens.size == 0:
        raise InvalidRequestError("prompt: must hold at least one token")
    bad = tokens[(tokens < 0) | (tokens >= capabilities.vocab_size)]
    if bad.size:
        raise InvalidRequestError(
            f"prompt: token id {int(bad[0])} is outside the vocabulary, 0..{capabilities.vocab_size - 1}"
        )
    if tokens.size + 1 > capabilities.max_context_length:
        raise InvalidRequestError(
            f"prompt: {tokens.size} tokens leave no room to generate; prompt and generated tokens together may be "
            f"{capabilities.max_context_length}"
        )
    return tokens


def check_params(params: SamplingParams) -> None:
    """Raise `InvalidRequestError` for a parameter outside its range; `StopRules.build` checks the stop condition."""
    if params.max_tokens is not None and params.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens: must be at least 1, got {params.max_tokens}")
    if not math.isfinite(params.temperature) or params.temperature < 0.0:
        raise InvalidRequestError(f"temperature: must be 0 (greedy) or more and finite, got {params.temperature}")
    if not 0.0 < params.top_p <= 1.0:
        raise InvalidRequestError(f"top_p: must lie in (0, 1], got {params.top_p}")
    if params.top_k == 0 or params.top_k < -1:
        raise InvalidRequestError(f"top_k: must be -1 (off) or at least 1, got {params.top_k}")
    if params.seed is None:
        raise InvalidRequestError("seed: must be drawn before a sample reaches the sampler")


def check_extras(request: SampleInput, prompt_size: int, capabilities: SamplerCapabilities) -> None:
    """Raise `InvalidRequestError` for a bad count or a bad question about the prompt."""
    if request.num_samples < 1:
        raise InvalidRequestError(f"num_samples: must be at least 1, got {request.num_samples}")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        value = getattr(request, name)
        if not 0 <= value <= capabilities.max_topk:
            raise InvalidRequestError(f"{name}: must lie in 0..{capabilities.max_topk}, got {value}")
    last_n = request.prompt_logprobs_last_n
    if last_n is not None:
        if not request.prompt_logprobs:
            raise InvalidRequestError("prompt_logprobs_last_n: applies to prompt logprobs; set prompt_logprobs")
        if not 1 <= last_n < prompt_size:
            raise InvalidRequestError(
                f"prompt_logprobs_last_n: must lie in 1..{prompt_size - 1} for a prompt of {prompt_size} tokens, "
                f"got {last_n}"
            )
    if request.target_prompt_logprobs is not None:
        _check_targets(request.target_prompt_logprobs, prompt_size, capabilities)


def _check_targets(targets: TensorData, prompt_size: int, capabilities: SamplerCapabilities) -> None:
    if targets.dtype is not TensorDType.INT64:
        raise InvalidRequestError(f"target_prompt_logprobs: must be int64, got {targets.dtype}")
    if len(targets.shape) != 2 or targets.shape[0] != prompt_size - 1:
        raise InvalidRequestError(
            f"target_prompt_logprobs: must have shape [{prompt_size - 1}, K] for a prompt of {prompt_size} tokens, "
            f"got {list(targets.shape)}"
        )
    cells = targets.data.astype(np.int64)
    if np.any((cells < -1) | (cells >= capabilities.vocab_size)):
        raise InvalidRequestError(
            f"target_prompt_logprobs: token ids must lie in 0..{capabilities.vocab_size - 1}, or be -1 to skip a cell"
        )
    if not np.any(cells >= 0):
        raise InvalidRequestError("target_prompt_logprobs: must name at least one token id")
