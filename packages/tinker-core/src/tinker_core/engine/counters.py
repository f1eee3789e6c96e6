"""What a server has done since it started, by base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from tinker_core.scheduler import Work, WorkKind
from tinker_core.types import EngineOutput, ForwardBackwardOutput, RequestError, RequestType, SampleOutput

Observer = Callable[[RequestType, float, RequestError | None], None]
"""Told of each result: the request's type, the seconds since it was accepted, and its error if it failed."""

WorkObserver = Callable[[str, WorkKind, float, float], None]
"""Told of each piece of work: base model, kind, seconds it took, and the share of the token budget that it filled."""


class Counters:
    """Finished requests and their tokens; no owner's in particular."""

    def __init__(self) -> None:
        self.completed: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.trained_tokens: Counter[str] = Counter()
        self.prefilled_tokens: Counter[str] = Counter()
        self.sampled_tokens: Counter[str] = Counter()
        self.observers: list[Observer] = []
        self.work_observers: list[WorkObserver] = []

    def note(self, base_model: str, request_type: RequestType, seconds: float, output: EngineOutput) -> None:
        """A request has its result."""
        error = output if isinstance(output, RequestError) else None
        (self.completed if error is None else self.failed)[base_model] += 1
        for observe in self.observers:
            observe(request_type, seconds, error)

    def note_work(self, base_model: str, work: Work, seconds: float, token_budget: int) -> None:
        """A piece of work has been done, whatever became of it."""
        fill = sum(request.num_tokens for request in work.requests) / token_budget
        for observe in self.work_observers:
            observe(base_model, work.kind, seconds, fill)

    def note_tokens(self, base_model: str, num_tokens: int, output: EngineOutput) -> None:
        """A request with inputs of so many tokens has its result; one that failed counts nothing."""
        if isinstance(output, ForwardBackwardOutput):
            self.trained_tokens[base_model] += num_tokens
        elif isinstance(output, SampleOutput):
            self.prefilled_tokens[base_model] += num_tokens
            self.sampled_tokens[base_model] += sum(len(sequence.tokens) for sequence in output.sequences)
