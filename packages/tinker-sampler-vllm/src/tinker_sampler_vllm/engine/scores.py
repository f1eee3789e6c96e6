"""What a request asks about its prompt, computed beside vLLM's own forward pass, in the process of a vLLM worker.

vLLM offers logprobs of the prompt's own tokens and of the likeliest, not of chosen ones, no draws, and with an adapter
on the ``lm_head`` it takes the adapter of whichever request is in the same place of the batch.  The hidden states that
it computed are all that is needed: `tinker_core.sampling.scoring` does the rest, as it does for the colocated sampler.
"""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import torch

from tinker_core.encoding import Encoder
from tinker_core.sampling.scoring import PromptScores
from tinker_core.types import PromptAltTokens, SampleInput, TensorData, TopkLogprobs

SCORES_KEY = "tinker_scores"
"""The key of ``SamplingParams.extra_args`` that holds an encoded `Question`."""
_CHUNK = 1024
"""Rows whose logits are held at once."""


@attrs.frozen(kw_only=True)
class Question:
    """What to compute of a prompt, and the name to fetch it by."""

    key: str
    request: SampleInput
    """The prompt of it is not needed and left empty."""


@attrs.frozen(kw_only=True)
class PromptAnswers:
    """The parts of a `SampleOutput` that are about the prompt."""

    finite: bool = True
    """False where the logits of some position were not."""
    prompt_logprobs: TensorData | None = None
    topk_prompt_logprobs: TopkLogprobs | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: PromptAltTokens | None = None


class PromptScorer:
    """Watches the steps of one model runner and keeps answers until they are fetched."""

    def __init__(self, runner: Any) -> None:  # noqa: ANN401 - vLLM's model runner is not typed
        self._runner = runner
        self._encoder = Encoder()
        self._questions: dict[str, tuple[str, PromptScores] | None] = {}
        """By vLLM's request id: key and scores, or None for requests that ask nothing."""
        self._scores: dict[str, PromptScores] = {}
        """By key."""
        self._own = runner._get_prompt_logprobs_dict
        runner._get_prompt_logprobs_dict = self._after_step

    def _after_step(self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:  # noqa: ANN401
        """Takes the place of the runner's own method, which is called with the hidden states of every step."""
        for request_id, num_tokens in num_scheduled_tokens.items():
            question = self._question(request_id)
            if question is not None:
                self._score(request_id, question[1], hidden_states, num_tokens)
        if len(self._questions) > 2 * len(self._runner.requests) + 64:
            self._questions = {name: known for name, known in self._questions.items() if name in self._runner.requests}
        return self._own(hidden_states, num_scheduled_tokens)

    def _question(self, request_id: str) -> tuple[str, PromptScores] | None:
        if request_id not in self._questions:
            state = self._runner.requests[request_id]
            extra = (state.sampling_params.extra_args or {}) if state.sampling_params is not None else {}
            found = None
            if SCORES_KEY in extra:
                question: Question = self._encoder.decode(extra[SCORES_KEY], Question)
                scores = PromptScores(question.request, np.asarray(state.prompt_token_ids, dtype=np.int64))
                self._scores[question.key] = scores
                found = (question.key, scores)
            self._questions[request_id] = found
        return self._questions[request_id]

    def _score(self, request_id: str, scores: PromptScores, hidden_states: torch.Tensor, num_tokens: int) -> None:
        runner = self._runner
        state = runner.requests[request_id]
        computed = state.num_computed_tokens
        first = max(scores.first_row, computed)
        end = min(computed + num_tokens, len(state.prompt_token_ids) - 1)
        if first >= end:
            return
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]) - computed
        for start in range(first, end, _CHUNK):
            stop = min(end, start + _CHUNK)
            self._select_adapter(state, stop - start)
            logits = runner.model.compute_logits(hidden_states[offset + start : offset + stop])
            if logits is not None:  # only one rank of several has them
                scores.add(start, logits.float())

    def _select_adapter(self, state: Any, num_rows: int) -> None:  # noqa: ANN401
        """Have the ``lm_head`` use this request's adapter for all rows; each step sets its own again."""
        if self._runner.lora_config is None:
            return
        request = state.lora_request
        rows = (0 if request is None else request.lora_int_id,) * num_rows
        self._runner._set_active_loras(rows, rows, set() if request is None else {request})

    def take(self, key: str) -> bytes:
        """The encoded `PromptAnswers` of a request that has ended; they are forgotten."""
        scores = self._scores.pop(key, None)
        if scores is None:
            return b""
        answers = PromptAnswers(
            finite=scores.finite,
            prompt_logprobs=scores.prompt_logprobs,
            topk_prompt_logprobs=scores.topk_prompt_logprobs,
            target_prompt_logprobs=scores.target_prompt_logprobs,
            prompt_alt_tokens=scores.prompt_alt_tokens,
        )
        return self._encoder.encode(answers, PromptAnswers)
