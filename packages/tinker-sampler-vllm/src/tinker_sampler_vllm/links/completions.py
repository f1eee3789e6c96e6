"""A sample in the terms of vLLM's completions API, and its answers in ours: token ids both ways, never text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinker_core.errors import ConfigurationError, NonFiniteError, TinkerError, WorkerLostError
from tinker_core.sampling.stopping import StopRule
from tinker_core.types import EMPTY_LOGPROB, GeneratedSequence, SampleInput, StopReason, TensorData, TopkLogprobs

Pairs = Iterable[tuple[int, float]]
"""Token ids with logprobs."""

_TOKEN_PREFIX = "token_id:"
"""How vLLM writes a token that it was told not to write as text."""
_NEUTRAL = {
    "n": 1,
    "echo": False,
    "min_tokens": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "watermarking": False,
    "stop": [],
    "ignore_eos": True,  # which tokens end a sequence is in stop_token_ids
    "add_special_tokens": False,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
"""Said in every request, because whoever started the server may have chosen other defaults."""


@attrs.frozen(kw_only=True)
class PlainSample:
    """A checked request with everything that a plain server must be told."""

    request: SampleInput
    prompt: list[int]
    stop: StopRule
    max_new_tokens: int
    seeds: tuple[int, ...]
    """One for each sequence."""

    @property
    def asks_about_prompt(self) -> bool:
        """Whether anything besides generated tokens is wanted."""
        return bool(self.request.prompt_logprobs or self.request.topk_prompt_logprobs)


def completion_body(
    model: str, sample: PlainSample, index: int, *, asks: bool = False, streams: bool = False, generates: bool = True
) -> dict[str, Any]:
    """The request for one sequence, with the questions about the prompt if it ``asks``; vLLM generates in any case."""
    params = sample.request.sampling_params
    body = _NEUTRAL | {
        "model": model,
        "prompt": sample.prompt,
        "max_tokens": sample.max_new_tokens if generates else 1,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": max(params.top_k, 0),
        "seed": sample.seeds[index],
        "stop_token_ids": sorted(sample.stop.tokens),
        "logprobs": sample.request.topk_sample_logprobs,
        "stream": streams,
    }
    return body | {"prompt_logprobs": sample.request.topk_prompt_logprobs} if asks else body


def probe_body(model: str, topk: int) -> dict[str, Any]:
    """A request for one token whose logprobs show in which form the server reports them; see `check_logprobs_mode`."""
    return _NEUTRAL | {
        "model": model,
        "prompt": _PROBE,
        "max_tokens": 1,
        "temperature": 2.0,
        "top_p": 1.0,
        "top_k": 1,
        "seed": 0,
        "stop_token_ids": [],
        "logprobs": topk,
        "stream": False,
    }


@contextmanager
def understood(name: str) -> Iterator[None]:
    """Blame the server for answers that are not in vLLM's form."""
    try:
        yield
    except TinkerError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{name} does not answer as the completions API of vLLM 0.32 does ({type(error).__name__}: {error}); "
            "is it a vLLM server, and not an older one?"
        ) from error


def check_logprobs_mode(name: str, answer: Mapping[str, Any], vocab_size: int) -> None:
    """Raise `ConfigurationError` unless logprobs are the model's own, by an answer to `probe_body`.

    That asks for the likeliest token at top_k 1: with it applied, only it, and what ties with it, has a logprob.
    """
    (choice,) = answer["choices"]
    values = [value for _, value in _likeliest(_step_pairs(choice["logprobs"]["top_logprobs"][0]), vocab_size)]
    total = sum(math.exp(min(value, 1.0)) for value in values)
    is_processed = values[-1] <= _NO_LOGPROB or (values[0] == values[-1] and total > 1.0 - _ROUNDING)
    is_logprob = -math.log(vocab_size) - _ROUNDING <= values[0] <= _ROUNDING and total <= 1.0 + _ROUNDING
    if is_processed or not is_logprob:
        raise ConfigurationError(
            f"{name} does not report the model's own logprobs; start it with --logprobs-mode raw_logprobs"
        )


_PROBE = [1, 2, 3, 4]
"""Some prompt: not the token 0 alone, which often is padding, after which all tokens may be equally likely."""
_NO_LOGPROB = -9999.0
"""What the server writes for minus infinity."""
_ROUNDING = 0.05
"""More than low precision explains."""


class SequenceReader:
    """Collects one sequence from the choices of an answer: one in all, or one for each part of a stream."""

    def __init__(self, name: str, sample: PlainSample) -> None:
        self._name = name
        self._sample = sample
        self._watch = sample.stop.watch(sample.prompt) if sample.stop.texts else None
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._rows: list[list[tuple[int, float]]] = []
        self._finish: str | None = None
        self.stopped = False
        """Whether a stop condition was met: nothing that comes after belongs to the sequence."""

    def add(self, choice: Mapping[str, Any]) -> None:
        """Take new tokens; raises `NonFiniteError`."""
        prompt = choice.get("prompt_token_ids")
        if prompt is not None and prompt != self._sample.prompt:
            raise ConfigurationError(f"{self._name} changed the prompt: it may not truncate or complete it")
        self._finish = choice.get("finish_reason")
        tokens, logprobs = choice["token_ids"], choice["logprobs"]
        if not tokens:
            return
        k = self._sample.request.topk_sample_logprobs
        for token, own, step in zip(tokens, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            if self.stopped:
                return
            self._tokens.append(int(token))
            self._logprobs.append(_finite(own))
            if k:
                self._rows.append(_likeliest(_step_pairs(step), k))
            self.stopped = token in self._sample.stop.tokens or (self._watch is not None and self._watch.ends(token))

    def finish(self) -> GeneratedSequence:
        """The finished record; raises `WorkerLostError` or `ConfigurationError` for one that ended too early."""
        if not self.stopped and len(self._tokens) < self._sample.max_new_tokens:
            if self._finish in (None, "abort"):
                raise WorkerLostError(f"{self._name} gave up a request")
            raise ConfigurationError(
                f"{self._name} ended a sequence by a rule of its own (finish_reason {self._finish!r} after "
                f"{len(self._tokens)} of {self._sample.max_new_tokens} tokens); start it with --generation-config vllm "
                "and without max_new_tokens or stop tokens in --override-generation-config"
            )
        k = self._sample.request.topk_sample_logprobs
        return GeneratedSequence(
            stop_reason=StopReason.STOP if self.stopped else StopReason.LENGTH,
            tokens=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            topk_logprobs=_table(self._rows, k) if k else None,
        )


@attrs.frozen(kw_only=True)
class PromptLogprobs:
    """What was asked about the prompt, as `SampleOutput` has it."""

    own: TensorData | None = None
    topk: TopkLogprobs | None = None

    @classmethod
    def read(cls, sample: PlainSample, choice: Mapping[str, Any]) -> PromptLogprobs:
        """The answers of one choice; raises `NonFiniteError`."""
        request, steps = sample.request, choice["prompt_logprobs"]
        size, k = len(sample.prompt), request.topk_prompt_logprobs
        if len(steps) != size:
            raise ValueError(f"{len(steps)} prompt logprobs for {size} tokens")
        own: npt.NDArray[np.float32] = np.full(size, np.nan, dtype=np.float32)
        rows: list[list[tuple[int, float]]] = [[] for _ in range(size)]
        first = 1 if request.prompt_logprobs_last_n is None else size - request.prompt_logprobs_last_n
        for position in range(first, size):
            step = {int(token): _finite(entry["logprob"]) for token, entry in steps[position].items()}
            own[position] = step[sample.prompt[position]]
            rows[position] = _likeliest(step.items(), k)
        return cls(
            own=TensorData.from_numpy(own) if request.prompt_logprobs else None, topk=_table(rows, k) if k else None
        )


def _step_pairs(step: Mapping[str, float]) -> Pairs:
    """What the server says of the likeliest tokens at one place, and of the chosen one if it is not among them."""
    for name, logprob in step.items():
        if not name.startswith(_TOKEN_PREFIX):
            raise ValueError(f"token {name!r} where {_TOKEN_PREFIX}… was asked for")
        yield int(name.removeprefix(_TOKEN_PREFIX)), _finite(logprob)


def _likeliest(pairs: Pairs, k: int) -> list[tuple[int, float]]:
    return sorted(pairs, key=lambda pair: -pair[1])[:k]


def _finite(logprob: float | None) -> float:
    if logprob is None or not math.isfinite(logprob):
        raise NonFiniteError("the logits are not finite; the model has diverged")
    return float(logprob)


def _table(rows: Sequence[Sequence[tuple[int, float]]], k: int) -> TopkLogprobs:
    ids = np.zeros((len(rows), k), dtype=np.int64)
    values = np.full((len(rows), k), EMPTY_LOGPROB, dtype=np.float32)
    for place, row in enumerate(rows):  # a row may be empty, or shorter than k where the vocabulary is
        ids[place, : len(row)] = [token for token, _ in row]
        values[place, : len(row)] = [logprob for _, logprob in row]
    return TopkLogprobs(token_ids=TensorData.from_numpy(ids), logprobs=TensorData.from_numpy(values))


def decode_events(buffer: bytes) -> tuple[list[Any], bytes]:
    """The complete server-sent events in a buffer, decoded, and what is left of it; the end of a stream is None."""
    *lines, rest = buffer.split(b"\n")
    data = [line.removeprefix(b"data:").strip() for line in lines if line.startswith(b"data:")]
    return [None if event == b"[DONE]" else json.loads(event) for event in data], rest
