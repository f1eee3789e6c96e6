"""What a request asks about its prompt: logprobs of the prompt's tokens, of the likeliest, of named ones, and draws.

Hidden row i of a prompt describes position i + 1.  Rows arrive in chunks, in order, each with its logits.

Shapes: P prompt tokens, N rows of a chunk, V vocabulary, k asked per position.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tinker_core.sampling.drawing import invert
from tinker_core.sampling.numbers import Stream, uniforms, words
from tinker_core.types import EMPTY_LOGPROB, PromptAltTokens, SampleInput, TensorData, TopkLogprobs


class TopkTable:
    """A top-k table under construction, ``[n, k]``; untouched cells stay empty."""

    def __init__(self, rows: int, k: int) -> None:
        self.token_ids = np.zeros((rows, k), dtype=np.int64)
        self.logprobs = np.full((rows, k), EMPTY_LOGPROB, dtype=np.float32)

    def put(self, start: int, token_ids: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Fill rows from ``start``; a vocabulary smaller than k leaves the last cells empty."""
        rows, k = token_ids.shape
        self.token_ids[start : start + rows, :k] = token_ids.cpu().numpy()
        self.logprobs[start : start + rows, :k] = logprobs.cpu().numpy()

    def finish(self) -> TopkLogprobs:
        """The finished record."""
        return TopkLogprobs(
            token_ids=TensorData.from_numpy(self.token_ids), logprobs=TensorData.from_numpy(self.logprobs)
        )


class PromptScores:
    """Collects everything asked about one prompt."""

    def __init__(self, request: SampleInput, prompt: npt.NDArray[np.int64]) -> None:
        self._request = request
        self._prompt = prompt
        size = prompt.size
        last_n = request.prompt_logprobs_last_n
        self._first_position = 1 if last_n is None else size - last_n
        self._logprobs = np.full(size, np.nan, dtype=np.float32) if request.prompt_logprobs else None
        self._topk = TopkTable(size, request.topk_prompt_logprobs) if request.topk_prompt_logprobs else None
        k = request.prompt_alt_tokens_k
        self._alt_tokens = np.zeros((size - 1, k), dtype=np.int64) if k else None
        self._alt_logprobs = np.zeros((size - 1, k), dtype=np.float32)
        self._targets = None if request.target_prompt_logprobs is None else _Targets(request.target_prompt_logprobs)
        self.finite = True
        """False once logits were not finite; the request must then fail."""

    @property
    def first_row(self) -> int:
        """The first hidden row that is needed, P - 1 when none is."""
        rows = [self._prompt.size - 1]
        if self._logprobs is not None or self._topk is not None:
            rows.append(self._first_position - 1)
        if self._alt_tokens is not None:
            rows.append(0)
        if self._targets is not None:
            rows.append(self._targets.first_row)
        return min(rows)

    def add(self, start: int, logits: torch.Tensor) -> None:
        """Take float32 logits ``[N, V]`` of hidden rows ``start``…, none of them row P - 1."""
        log_totals = logits.logsumexp(-1)
        if not bool(log_totals.isfinite().all()):
            self.finite = False
            return
        skip = max(0, self._first_position - 1 - start)
        if skip < logits.shape[0]:
            self._add_own(start + skip, logits[skip:], log_totals[skip:])
        if self._targets is not None:
            self._targets.add(start, logits, log_totals)
        if self._alt_tokens is not None:
            self._add_draws(self._alt_tokens, start, logits, log_totals)

    def _add_own(self, start: int, logits: torch.Tensor, log_totals: torch.Tensor) -> None:
        position = start + 1
        end = position + logits.shape[0]
        if self._logprobs is not None:
            own = torch.from_numpy(self._prompt[position:end]).to(logits.device)
            self._logprobs[position:end] = (logits.gather(1, own[:, None])[:, 0] - log_totals).cpu().numpy()
        if self._topk is not None:
            values, tokens = logits.topk(min(self._request.topk_prompt_logprobs, logits.shape[1]), dim=-1)
            self._topk.put(position, tokens, values - log_totals[:, None])

    def _add_draws(
        self, table: npt.NDArray[np.int64], start: int, logits: torch.Tensor, log_totals: torch.Tensor
    ) -> None:
        params = self._request.sampling_params
        rows, k = logits.shape[0], table.shape[1]
        if params.temperature == 0.0:
            tokens = logits.argmax(-1, keepdim=True).expand(-1, k)
        else:
            assert params.seed is not None
            seed, stream = words([params.seed]), words([Stream.PROMPT_ALTERNATIVES])
            positions = words(range(start + 1, start + 1 + rows))[:, None]
            numbers = uniforms(seed, stream, positions, words(range(k)))
            shifted = logits - logits.amax(-1, keepdim=True)
            tokens = invert((shifted / params.temperature).exp_(), torch.from_numpy(numbers).to(logits.device))
        logprobs = logits.gather(1, tokens) - log_totals[:, None]
        table[start : start + rows] = tokens.cpu().numpy()
        self._alt_logprobs[start : start + rows] = logprobs.cpu().numpy()

    @property
    def prompt_logprobs(self) -> TensorData | None:
        """float32 ``[P]`` if asked for."""
        return None if self._logprobs is None else TensorData.from_numpy(self._logprobs)

    @property
    def topk_prompt_logprobs(self) -> TopkLogprobs | None:
        """``[P, k]`` if asked for."""
        return None if self._topk is None else self._topk.finish()

    @property
    def target_prompt_logprobs(self) -> TensorData | None:
        """In the layout of the request, if asked for."""
        return None if self._targets is None else self._targets.finish()

    @property
    def prompt_alt_tokens(self) -> PromptAltTokens | None:
        """``[P - 1, k]`` if asked for."""
        if self._alt_tokens is None:
            return None
        return PromptAltTokens(
            tokens=TensorData.from_numpy(self._alt_tokens), logprobs=TensorData.from_numpy(self._alt_logprobs)
        )


class _Targets:
    """Logprobs of named tokens: the request's cells as (row, token) pairs, in storage order."""

    def __init__(self, wanted: TensorData) -> None:
        self._wanted = wanted
        dense_rows = np.repeat(np.arange(wanted.shape[0], dtype=np.int64), wanted.shape[1])
        self._rows = wanted.row_indices() if wanted.is_sparse else dense_rows
        self._tokens = wanted.data.astype(np.int64)
        self._cells = np.flatnonzero(self._tokens >= 0)
        self._values = np.zeros(wanted.data.size, dtype=np.float32)

    @property
    def first_row(self) -> int:
        """The first row that names a token."""
        return int(self._rows[self._cells].min())

    def add(self, start: int, logits: torch.Tensor, log_totals: torch.Tensor) -> None:
        """Take the logits ``[N, V]`` of rows ``start``…"""
        rows = self._rows[self._cells]
        cells = self._cells[(rows >= start) & (rows < start + logits.shape[0])]
        if cells.size:
            row = torch.from_numpy(self._rows[cells] - start).to(logits.device)
            token = torch.from_numpy(self._tokens[cells]).to(logits.device)
            self._values[cells] = (logits[row, token] - log_totals[row]).cpu().numpy()

    def finish(self) -> TensorData:
        """The values in the layout that was asked for."""
        return self._wanted.with_data(self._values)
