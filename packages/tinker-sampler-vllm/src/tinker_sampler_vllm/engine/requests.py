"""A sample request in vLLM's terms, and vLLM's outputs in ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from tinker_core.encoding import Encoder
from tinker_core.errors import NonFiniteError
from tinker_core.sampling.checking import check_extras, check_params, check_prompt
from tinker_core.sampling.stopping import StopRule, StopRules
from tinker_core.types import (
    EMPTY_LOGPROB,
    GeneratedSequence,
    ModelInput,
    PreparedSample,
    SampleInput,
    SamplerCapabilities,
    StopReason,
    TensorData,
    TopkLogprobs,
)
from tinker_sampler_vllm.engine.scores import SCORES_KEY, Question
from tinker_sampler_vllm.seeds import sequence_seed


@attrs.frozen(kw_only=True)
class CheckedSample:
    """A request that the engine can run."""

    sample: PreparedSample
    prompt: list[int]
    stop: StopRule
    max_new_tokens: int

    @property
    def request(self) -> SampleInput:
        """What the client sent."""
        return self.sample.request

    @property
    def asks_about_prompt(self) -> bool:
        """Whether anything besides generated tokens is wanted."""
        request = self.request
        return bool(
            request.prompt_logprobs
            or request.topk_prompt_logprobs
            or request.prompt_alt_tokens_k
            or request.target_prompt_logprobs is not None
        )


def check_sample(sample: PreparedSample, capabilities: SamplerCapabilities, stop_rules: StopRules) -> CheckedSample:
    """Check a request; raises `InvalidRequestError` or `UnsupportedFeatureError`."""
    request = sample.request
    prompt = check_prompt(request, capabilities)
    check_params(request.sampling_params)
    check_extras(request, prompt.size, capabilities)
    room = capabilities.max_context_length - prompt.size
    return CheckedSample(
        sample=sample,
        prompt=prompt.tolist(),
        stop=stop_rules.build(request.sampling_params.stop),
        max_new_tokens=min(room, request.sampling_params.max_tokens or room),
    )


def vllm_params(checked: CheckedSample, index: int, key: str, encoder: Encoder) -> Any:  # noqa: ANN401 - vLLM is not typed
    """``vllm.SamplingParams`` of one sequence; the first one also carries the questions about the prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rules = checked.request.sampling_params
    asks = index == 0 and checked.asks_about_prompt
    extra = None
    if asks:
        question = Question(key=key, request=attrs.evolve(checked.request, prompt=ModelInput(chunks=())))
        extra = {SCORES_KEY: encoder.encode(question, Question)}
    return SamplingParams(
        temperature=rules.temperature,
        top_k=max(rules.top_k, 0),
        top_p=rules.top_p,
        seed=sequence_seed(rules.seed or 0, index),
        max_tokens=checked.max_new_tokens,
        stop_token_ids=sorted(checked.stop.tokens),
        ignore_eos=True,  # which tokens end a sequence is in stop_token_ids
        logprobs=checked.request.topk_sample_logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if checked.stop.texts else RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=asks,
        extra_args=extra,
    )


class SequenceBuilder:
    """Collects one sequence from vLLM's outputs and notices its stop texts."""

    def __init__(self, checked: CheckedSample) -> None:
        self._checked = checked
        self._watch = checked.stop.watch(checked.prompt) if checked.stop.texts else None
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top_ids: list[Sequence[int]] = []
        self._top_logprobs: list[Sequence[float]] = []
        self.stopped = False
        """Whether a stop condition was met: nothing that comes after belongs to the sequence."""

    def add(self, output: Any) -> None:  # noqa: ANN401 - vLLM's CompletionOutput
        """Take new tokens; raises `NonFiniteError`."""
        flat = output.logprobs
        for place, token in enumerate(output.token_ids):
            if self.stopped:
                return
            start, end = flat.start_indices[place], flat.end_indices[place]
            logprob = flat.logprobs[start]
            if not np.isfinite(logprob):
                raise NonFiniteError("the logits are not finite; the model or its adapter has diverged")
            self._tokens.append(token)
            self._logprobs.append(logprob)
            if self._checked.request.topk_sample_logprobs:
                self._top_ids.append(flat.token_ids[start + 1 : end])
                self._top_logprobs.append(flat.logprobs[start + 1 : end])
            self.stopped = token in self._checked.stop.tokens or (self._watch is not None and self._watch.ends(token))

    def finish(self) -> GeneratedSequence:
        """The finished record."""
        return GeneratedSequence(
            stop_reason=StopReason.STOP if self.stopped else StopReason.LENGTH,
            tokens=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            topk_logprobs=self._table(self._checked.request.topk_sample_logprobs),
        )

    def _table(self, k: int) -> TopkLogprobs | None:
        if not k:
            return None
        ids = np.zeros((len(self._tokens), k), dtype=np.int64)
        values = np.full((len(self._tokens), k), EMPTY_LOGPROB, dtype=np.float32)
        for row, (tokens, logprobs) in enumerate(zip(self._top_ids, self._top_logprobs, strict=True)):
            width = min(k, len(tokens))  # a vocabulary may be smaller than k
            ids[row, :width], values[row, :width] = tokens[:width], logprobs[:width]
        return TopkLogprobs(token_ids=TensorData.from_numpy(ids), logprobs=TensorData.from_numpy(values))
