"""Where requests come in: each is accepted once, checked, and given to its model's queue or to the sampler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import attrs

from tinker_core.engine.acceptance import (
    NO_TOKENS,
    Acceptance,
    Tokens,
    creates_model,
    identity_of,
    model_of,
    sample_identity,
    seq_id_of,
)
from tinker_core.engine.admission import Admission
from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.clock import Clock
from tinker_core.engine.futures import FutureTable, PendingResult
from tinker_core.engine.interruption import to_its_end
from tinker_core.engine.limits import KeyLimiter
from tinker_core.engine.model_state import queued
from tinker_core.engine.models import FindRun, new_model, release_model
from tinker_core.engine.payloads import Payloads
from tinker_core.engine.registry import Registry
from tinker_core.engine.sampling import Sampling
from tinker_core.engine.usage import Metered
from tinker_core.errors import (
    InvalidRequestError,
    SessionFinishedError,
    TinkerError,
    UnknownBaseModelError,
    UnsupportedFeatureError,
)
from tinker_core.executors.rank_loop import describe_error
from tinker_core.types import (
    AcceptedRequest,
    Caller,
    CreateCustomLossInput,
    CreateModelInput,
    EngineOutput,
    EngineRequest,
    ForwardBackwardInput,
    LoadWeightsInput,
    RequestError,
    RequestType,
    SampleInput,
    SamplerRecord,
    TrainingRunRecord,
    UnloadModelInput,
    UnloadModelOutput,
    session_of_run,
)

log = logging.getLogger(__name__)

Resolve = Callable[[str, EngineOutput], None]
RunBehind = Callable[[Coroutine[Any, Any, None]], object]
"""Starts work that nobody waits for; the engine ends it when it closes."""


@attrs.frozen(kw_only=True, eq=False)
class Intake:
    """Takes requests in. A training request never raises once it is accepted: its failure is its future's result."""

    _registry: Registry
    _acceptance: Acceptance
    _admission: Admission
    _limiter: KeyLimiter
    _checkpoints: Checkpoints
    _payloads: Payloads
    _sampling: Sampling
    _futures: FutureTable
    _clock: Clock
    _bases: Mapping[str, BaseModel]
    _resolve: Resolve
    _run_behind: RunBehind

    async def submit(self, request: EngineRequest, caller: Caller) -> AcceptedRequest:
        """Accept a request, once: a repeat gets the first one's receipt. It is durable when this returns.

        Raises `JournalFullError` when nothing can be accepted now.
        """
        if isinstance(request, SampleInput):
            record = await self._registry.sampler(request.sampling_session_id, caller.owner)
            await self._registry.require_open(record.session_id, caller.owner)
            self._registry.saw(record.session_id, self._clock.monotonic())
            return await self._submit_sample(request, record, caller)
        repeated = await self._repeated(request, caller.owner)
        tokens = self._tokens(request, caller)
        if repeated is None and await self._limiter.hold(caller, tokens.most):
            repeated = await self._repeated(request, caller.owner)  # it may have been sent again meanwhile
        if repeated is not None:
            return repeated
        # To its end, also when the client goes away: what is in the journal must run.
        return await to_its_end(self._take_in(request, caller, tokens))

    async def _take_in(self, request: EngineRequest, caller: Caller, tokens: Tokens) -> AcceptedRequest:
        accepted = await self._acceptance.accept(request, caller, tokens)
        if isinstance(accepted, AcceptedRequest):
            return accepted
        entry, request = accepted
        await self.route(request, entry)
        self._saw_client_of(request)
        return entry.accepted

    async def route(self, request: EngineRequest, entry: PendingResult) -> None:
        """Check an accepted request and give it to whoever runs it; if it cannot run, its future says why."""
        try:
            await self._route(request, entry)
        except TinkerError as error:
            self._resolve(entry.accepted.request_id, describe_error(error))

    async def submit_failed(
        self, model_id: str, seq_id: int, request_type: RequestType, error: RequestError, caller: Caller
    ) -> AcceptedRequest:
        """Accept a request that could not be decoded: it fails, and keeps its place in its model's order."""
        await self._limiter.hold(caller, 0)
        entry = await self._acceptance.accept_unreadable(request_type, caller, model_id, seq_id)
        if isinstance(entry, AcceptedRequest):
            return entry
        self._take_slot(entry, seq_id)
        self._resolve(entry.accepted.request_id, error)
        return entry.accepted

    async def submit_failed_sample(
        self, sampling_session_id: str, seq_id: int, error: RequestError, caller: Caller
    ) -> AcceptedRequest:
        """Accept a sample that could not be decoded: it fails, as one that could not be served does."""
        record = await self._registry.sampler(sampling_session_id, caller.owner)
        await self._registry.require_open(record.session_id, caller.owner)
        repeated = await self._acceptance.find(caller.owner, sample_identity(sampling_session_id, seq_id))
        if repeated is not None:
            return repeated
        self._limiter.admit_sample(caller, 0)
        entry = await self._acceptance.accept_unreadable_sample(sampling_session_id, seq_id, caller)
        if isinstance(entry, AcceptedRequest):
            return entry
        entry.base_model = record.base_model
        self._resolve(entry.accepted.request_id, error)
        return entry.accepted

    def _saw_client_of(self, request: EngineRequest) -> None:
        session_id = getattr(request, "session_id", None) or session_of_run(model_of(request) or "")
        if session_id is not None:
            self._registry.saw(session_id, self._clock.monotonic())

    async def _repeated(self, request: EngineRequest, owner: str) -> AcceptedRequest | None:
        """The receipt of the same request by the same owner; raises if its session takes no new work."""
        await self._require_open_session(request, owner)
        return await self._acceptance.find(owner, identity_of(request))

    def _tokens(self, request: EngineRequest, caller: Caller) -> Tokens:
        """Tokens that a pass needs room for; none for one that will fail for other reasons."""
        if not isinstance(request, ForwardBackwardInput):
            return NO_TOKENS
        try:
            run = self._registry.model(request.model_id, caller.owner)
            num_tokens = self._base_of(run.base_model).count_tokens(request.data)
        except TinkerError:
            return NO_TOKENS
        return Tokens(num=num_tokens, most=num_tokens)

    async def _require_open_session(self, request: EngineRequest, owner: str) -> None:
        made_in = getattr(request, "session_id", None)  # of what makes something new in a session
        if made_in is not None:
            await self._registry.require_open(made_in, owner)
        else:
            session_id = session_of_run(model_of(request) or "")
            if session_id is not None and self._registry.finished_sessions.get(session_id) == owner:
                raise SessionFinishedError(session_id)

    async def _route(self, request: EngineRequest, entry: PendingResult) -> None:
        if isinstance(request, CreateCustomLossInput):
            self._resolve(entry.accepted.request_id, self._admission.create_custom_loss(request))
            return
        if isinstance(request, UnloadModelInput):
            self._unload(request, entry)
            return
        if creates_model(request):
            assert isinstance(request, CreateModelInput | LoadWeightsInput)
            new = await new_model(
                request,
                entry,
                session=self._registry.session,
                find_run=self._find_run(entry),
                checkpoints=self._checkpoints,
                now=self._clock.now(),
            )
            base = self._base_of(new.run.base_model)
            if not base.spec.trainable:
                raise UnsupportedFeatureError(f"base model {base.spec.name!r} is served for sampling only")
            run = new.run
            self._admission.check_model(run, base)
            entry.base_model = base.spec.name
            alive = {model_id for each in self._bases.values() for model_id in each.scheduler.model_ids()}
            self._limiter.claim_model(entry.caller, run.model_id, run.lora_config.rank, alive)
            base.add_model(run.model_id, run.owner)
            self._payloads.keep(entry.accepted.request_id, new)
        else:
            run = self._registry.model(model_of(request) or "", entry.owner)
            base = self._base_of(run.base_model)
            entry.base_model = base.spec.name
            self._registry.touch(run.model_id, self._clock.now())
            try:
                request = self._admission.admit(request, run, base)
            except TinkerError:
                self._take_slot(entry, seq_id_of(request))
                raise
            self._payloads.take_in(entry.accepted.request_id, request, number=entry.number, size=entry.size)
        self._enqueue(base, request, entry, run)

    def _unload(self, request: UnloadModelInput, entry: PendingResult) -> None:
        """Release a model behind the caller's back; the request has no place in the model's order."""
        if entry.recovered and not self._registry.is_live(request.model_id):
            # An earlier process did it, and did not live to say so.
            self._resolve(entry.accepted.request_id, UnloadModelOutput(model_id=request.model_id))
            return
        run = self._registry.model(request.model_id, entry.owner)
        entry.base_model = run.base_model

        async def release() -> None:
            output: EngineOutput = UnloadModelOutput(model_id=run.model_id)
            try:
                await release_model(
                    run, self._registry, self._base_of(run.base_model), self._futures, keep_weights=True
                )
            except TinkerError as error:
                output = describe_error(error)
            self._resolve(entry.accepted.request_id, output)

        self._run_behind(release())

    def _find_run(self, entry: PendingResult) -> FindRun:
        """How to find the run of a model's id, if that is taken.

        A run that an earlier process recorded for this very request, without living to say so, does not count.
        """

        async def find(model_id: str) -> TrainingRunRecord | None:
            run = await self._registry.control.get_run(model_id)
            unfinished = entry.recovered and not self._registry.is_live(model_id)
            return None if unfinished else run

        return find

    def _enqueue(self, base: BaseModel, request: EngineRequest, entry: PendingResult, run: TrainingRunRecord) -> None:
        if isinstance(request, ForwardBackwardInput) and not entry.num_tokens:
            # It could not be counted when it came in. If it still cannot, its future says why.
            try:
                entry.num_tokens = base.count_tokens(request.data)
            except TinkerError:
                self._take_slot(entry, request.seq_id)
                raise
        self.begin(entry, run)
        base.submit(queued(entry.accepted, run.model_id, seq_id_of(request), entry.num_tokens))

    def begin(self, entry: PendingResult, run: TrainingRunRecord) -> None:
        """Count a training request as one in flight."""
        self._limiter.begin(
            entry.accepted.request_id,
            Metered(
                caller=entry.caller,
                base_model=run.base_model,
                num_tokens=entry.num_tokens,
                max_tokens=entry.num_tokens,
                model_id=run.model_id,
                session_id=run.session_id,
                run_id=run.model_id,
                project_id=run.project_id,
            ),
        )

    def _take_slot(self, entry: PendingResult, seq_id: int) -> None:
        """Let a failed request's turn pass, so that its model's later requests do not wait for it."""
        try:
            run = self._registry.model(entry.accepted.model_id or "", entry.owner)
            request = queued(entry.accepted, run.model_id, seq_id, entry.num_tokens)
            self._base_of(run.base_model).submit(request)
        except TinkerError as error:
            log.info("request %s has no place in an order: %s", entry.accepted.request_id, error)

    async def _submit_sample(self, request: SampleInput, record: SamplerRecord, caller: Caller) -> AcceptedRequest:
        repeated = await self._acceptance.find(caller.owner, identity_of(request))
        if repeated is not None:
            return repeated
        if request.num_samples < 1:
            raise InvalidRequestError(f"num_samples={request.num_samples} must be at least 1")
        metered = self._base_of(record.base_model).meter_sample(request, record, caller)
        self._limiter.admit_sample(caller, metered.max_tokens)
        return await to_its_end(self._take_in_sample(request, record, metered))

    async def _take_in_sample(self, request: SampleInput, record: SamplerRecord, metered: Metered) -> AcceptedRequest:
        tokens = Tokens(num=metered.num_tokens, most=metered.max_tokens)
        accepted = await self._acceptance.accept(request, metered.caller, tokens)
        if isinstance(accepted, AcceptedRequest):
            return accepted
        entry, request = accepted
        entry.base_model = record.base_model
        self._limiter.begin(entry.accepted.request_id, metered)
        self._sampling.start(request, record, entry, self._base_of(record.base_model))
        return entry.accepted

    def _base_of(self, name: str) -> BaseModel:
        return base_named(name, self._bases)


def base_named(name: str, bases: Mapping[str, BaseModel]) -> BaseModel:
    """A base model by name; raises `UnknownBaseModelError`."""
    if name not in bases:
        raise UnknownBaseModelError(name, tuple(bases))
    return bases[name]
