"""Requests in progress: a job is one sample request, a running sequence one of its continuations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tinker_core.sampling.checking import check_extras, check_params, check_prompt
from tinker_core.sampling.colocated.cache import PromptCache
from tinker_core.sampling.colocated.packing import PromptChunk
from tinker_core.sampling.numbers import Stream, uniforms, words
from tinker_core.sampling.scoring import PromptScores, TopkTable
from tinker_core.sampling.stopping import StopRules
from tinker_core.training.adapters import AdapterWeights
from tinker_core.types import (
    GeneratedSequence,
    PreparedSample,
    SampleOutput,
    SamplerCapabilities,
    SamplingParams,
    StopReason,
)


class Job:
    """One sample request: its prompt, what it asks, and the sequences that have ended."""

    def __init__(
        self,
        sample: PreparedSample,
        weights: AdapterWeights | None,
        capabilities: SamplerCapabilities,
        stop_rules: StopRules,
    ) -> None:
        """Check the request; raises `InvalidRequestError` or `UnsupportedFeatureError`."""
        request = sample.request
        prompt = check_prompt(request, capabilities)
        check_params(request.sampling_params)
        check_extras(request, prompt.size, capabilities)
        self.stop_rule = stop_rules.build(request.sampling_params.stop)
        self.request_id = sample.request_id
        self.request = request
        self.weights = weights
        self.prompt: list[int] = prompt.tolist()
        room = capabilities.max_context_length - prompt.size
        self.max_new_tokens = min(room, request.sampling_params.max_tokens or room)
        self.scores = PromptScores(request, prompt)
        self.cache = PromptCache(prompt.size)
        self.first_logits: torch.Tensor | None = None
        """float32 ``[1, V]`` after the prompt; None until the whole prompt is computed."""
        self._num_computed = 0
        self._num_started = 0
        self._ended: dict[int, GeneratedSequence] = {}

    @property
    def params(self) -> SamplingParams:
        """How tokens are drawn."""
        return self.request.sampling_params

    @property
    def num_waiting(self) -> int:
        """Sequences that have not started."""
        return self.request.num_samples - self._num_started

    def next_chunk(self, budget: int) -> PromptChunk:
        """The next tokens of the prompt, at most ``budget``, which count as computed from now on."""
        start = self._num_computed
        self._num_computed = min(len(self.prompt), start + budget)
        return PromptChunk(
            weights=self.weights, tokens=self.prompt[start : self._num_computed], offset=start, cache=self.cache
        )

    @property
    def is_computed(self) -> bool:
        """Whether the whole prompt has been handed out by `next_chunk`."""
        return self._num_computed == len(self.prompt)

    @property
    def waits(self) -> bool:
        """Whether nothing of it has begun, or nothing after its prompt."""
        return self._num_computed == 0 or (self.is_computed and self._num_started == 0)

    def start(self, count: int) -> list[RunningSequence]:
        """Start the next ``count`` sequences."""
        first = self._num_started
        self._num_started += count
        return [RunningSequence(self, index) for index in range(first, first + count)]

    def end(self, sequence: RunningSequence, reason: StopReason) -> None:
        """Keep a sequence that has ended."""
        self._ended[sequence.index] = sequence.finish(reason)

    @property
    def is_done(self) -> bool:
        """Whether every sequence has ended."""
        return len(self._ended) == self.request.num_samples

    def output(self) -> SampleOutput:
        """The finished answer."""
        return SampleOutput(
            sequences=tuple(self._ended[index] for index in range(self.request.num_samples)),
            prompt_logprobs=self.scores.prompt_logprobs,
            topk_prompt_logprobs=self.scores.topk_prompt_logprobs,
            target_prompt_logprobs=self.scores.target_prompt_logprobs,
            prompt_alt_tokens=self.scores.prompt_alt_tokens,
        )


class RunningSequence:
    """One continuation under way."""

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self.index = index
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._topk: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._watch = job.stop_rule.watch(job.prompt)

    @property
    def position(self) -> int:
        """Where the newest token stands in the whole text."""
        return len(self.job.prompt) + len(self.tokens) - 1

    def add(self, token: int, logprob: float, topk: tuple[torch.Tensor, torch.Tensor] | None) -> StopReason | None:
        """Take the next token, and the likeliest ``[k]`` with logprobs; returns why the sequence ends, if it does."""
        self.tokens.append(token)
        self._logprobs.append(logprob)
        if topk is not None:
            self._topk.append(topk)
        if self._watch.ends(token):
            return StopReason.STOP
        return StopReason.LENGTH if len(self.tokens) == self.job.max_new_tokens else None

    def finish(self, reason: StopReason) -> GeneratedSequence:
        """The finished record."""
        table = None
        if self._topk:
            table = TopkTable(len(self.tokens), self.job.request.topk_sample_logprobs)
            table.put(0, torch.stack([ids for ids, _ in self._topk]), torch.stack([values for _, values in self._topk]))
        return GeneratedSequence(
            stop_reason=reason,
            tokens=tuple(self.tokens),
            logprobs=tuple(self._logprobs),
            topk_logprobs=None if table is None else table.finish(),
        )


def step_numbers(sequences: Sequence[RunningSequence]) -> npt.NDArray[np.float64]:
    """The uniform number of each sequence's next token, float64 ``[N]``."""
    return uniforms(
        words([Stream.SAMPLE]),
        words([sequence.job.params.seed or 0 for sequence in sequences]),
        words([sequence.index for sequence in sequences]),
        words([len(sequence.tokens) for sequence in sequences]),
    )
