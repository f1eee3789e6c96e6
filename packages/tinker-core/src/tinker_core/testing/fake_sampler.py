"""The sampler ``fake``: decodes the bigram of `tinker_core.testing.fakes`, one token per step and sequence."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np

from tinker_core.errors import InvalidRequestError, TinkerError, UnknownCheckpointError, UnsupportedFeatureError
from tinker_core.executors.rank_loop import describe_error
from tinker_core.interfaces import RankContext, StateWriter
from tinker_core.testing.fakes import (
    CONTEXT_LENGTH,
    EOS,
    VOCAB_SIZE,
    FakeAdapter,
    FakeHandle,
    log_softmax,
    next_token_logprobs,
)
from tinker_core.types import (
    GeneratedSequence,
    PreparedSample,
    SampleInput,
    SampleOutput,
    SamplerCapabilities,
    SampleResult,
    StopReason,
    TensorData,
    Transport,
    WeightsRef,
)

_REFUSED = ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k", "target_prompt_logprobs")


@attrs.define(kw_only=True, eq=False)
class _Sequence:
    random: np.random.Generator
    tokens: list[int] = attrs.field(factory=list)
    logprobs: list[float] = attrs.field(factory=list)
    stop_reason: StopReason | None = None


@attrs.define(kw_only=True, eq=False)
class _Running:
    sample: PreparedSample
    adapter: FakeAdapter | None
    last_prompt_token: int
    limit: int
    sequences: list[_Sequence]


class FakeSampler:
    """Implements `tinker_core.interfaces.RankSampler`; refuses what the bigram does not do, by name."""

    def __init__(self, context: RankContext, handle: FakeHandle) -> None:
        self._context = context
        self._handle = handle
        self._revisions: dict[str, FakeAdapter] = {}
        self._running: dict[str, _Running] = {}
        self._failed: list[SampleResult] = []

    def capabilities(self) -> SamplerCapabilities:
        """Text only."""
        return SamplerCapabilities(
            max_context_length=self._handle.capabilities.max_context_length,
            vocab_size=VOCAB_SIZE,
            transports=(Transport.IN_PROCESS, Transport.FILE),
            max_revisions=self._context.max_revisions,
        )

    def publish(self, revision: str, ref: WeightsRef) -> None:
        """Copy the adapter."""
        if revision not in self._revisions:
            self._revisions[revision] = self._handle.copy_adapter(ref)

    def capture_revision(self, revision: str) -> StateWriter:
        """What the trainer makes of the adapter."""
        if revision not in self._revisions:
            raise UnknownCheckpointError(revision)
        return self._handle.capture_adapter(self._revisions[revision])

    def retire(self, revision: str) -> None:
        """Drop the adapter."""
        self._revisions.pop(revision, None)

    def submit(self, sample: PreparedSample) -> None:
        """Queue a sample."""
        try:
            self._running[sample.request_id] = self._admit(sample)
        except TinkerError as error:
            self._failed.append(SampleResult(request_id=sample.request_id, error=describe_error(error)))

    def _admit(self, sample: PreparedSample) -> _Running:
        request = sample.request
        for name in _REFUSED:
            if getattr(request, name):
                raise UnsupportedFeatureError(f"the fake sampler does not offer {name}")
        if request.sampling_params.stop.texts:
            raise UnsupportedFeatureError("the fake sampler has no tokenizer; give stop as token ids")
        if sample.revision is not None and sample.revision not in self._revisions:
            raise UnknownCheckpointError(sample.revision)
        tokens = request.prompt.text_tokens()
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= VOCAB_SIZE:
            raise InvalidRequestError(f"prompt must hold token ids 0 to {VOCAB_SIZE - 1}")
        room = (self._context.max_context_length or CONTEXT_LENGTH) - tokens.size
        wanted = request.sampling_params.max_tokens
        if room < 1 or (wanted is not None and wanted < 1):
            raise InvalidRequestError("max_tokens must be at least 1, and the prompt shorter than the context")
        seed = abs(request.sampling_params.seed or 0)
        sequences = [_Sequence(random=np.random.default_rng([seed, index])) for index in range(request.num_samples)]
        adapter = self._revisions[sample.revision] if sample.revision is not None else None
        return _Running(
            sample=sample,
            adapter=adapter,
            last_prompt_token=int(tokens[-1]),
            limit=min(room, wanted or room),
            sequences=sequences,
        )

    def cancel(self, request_id: str) -> None:
        """Drop a sample."""
        self._running.pop(request_id, None)

    def is_waiting(self, request_id: str) -> bool:
        """Every sample begins at once."""
        del request_id
        return False

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._running or self._failed)

    def step(self) -> tuple[SampleResult, ...]:
        """One token for each running sequence."""
        ended, self._failed = self._failed, []
        for request_id, running in list(self._running.items()):
            for sequence in running.sequences:
                if sequence.stop_reason is None:
                    self._extend(running, sequence)
            if all(sequence.stop_reason is not None for sequence in running.sequences):
                del self._running[request_id]
                ended.append(SampleResult(request_id=request_id, output=self._output(running)))
        return tuple(ended)

    def _extend(self, running: _Running, sequence: _Sequence) -> None:
        params = running.sample.request.sampling_params
        last = sequence.tokens[-1] if sequence.tokens else running.last_prompt_token
        logprobs = next_token_logprobs(self._handle.base, running.adapter, np.array([last], np.int32))[0]
        if params.temperature == 0:
            token = int(logprobs.argmax())
        else:
            weights = np.exp(log_softmax(logprobs[None] / np.float32(params.temperature))[0].astype(np.float64))
            token = int(sequence.random.choice(VOCAB_SIZE, p=weights / weights.sum()))
        sequence.tokens.append(token)
        sequence.logprobs.append(float(logprobs[token]))
        if token in params.stop.tokens or (params.stop.at_eos and token == EOS):
            sequence.stop_reason = StopReason.STOP
        elif len(sequence.tokens) >= running.limit:
            sequence.stop_reason = StopReason.LENGTH

    def _output(self, running: _Running) -> SampleOutput:
        sequences = tuple(
            GeneratedSequence(
                stop_reason=sequence.stop_reason or StopReason.LENGTH,
                tokens=tuple(sequence.tokens),
                logprobs=tuple(sequence.logprobs),
            )
            for sequence in running.sequences
        )
        request = running.sample.request
        prompt = self._prompt_logprobs(running, request) if request.prompt_logprobs else None
        return SampleOutput(sequences=sequences, prompt_logprobs=prompt)

    def _prompt_logprobs(self, running: _Running, request: SampleInput) -> TensorData:
        tokens = request.prompt.text_tokens()
        values = np.full(tokens.size, np.nan, np.float32)
        table = next_token_logprobs(self._handle.base, running.adapter, tokens[:-1])
        values[1:] = table[np.arange(tokens.size - 1), tokens[1:]]
        if request.prompt_logprobs_last_n is not None:
            values[: tokens.size - request.prompt_logprobs_last_n] = np.nan
        return TensorData.from_numpy(values)


def build_sampler(context: RankContext, handle: Any) -> FakeSampler:  # noqa: ANN401 - a FakeHandle
    """The builder that the plugin registers."""
    return FakeSampler(context, handle)
