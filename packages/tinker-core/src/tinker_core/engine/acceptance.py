"""The single place where a request is accepted: after it, it has an id, all its random choices, and is durable.

A repeat of a request (a client that lost our answer sends it again) gets the first one's receipt.  The identities are
(model, seq_id), (sampling session, seq_id), (session, model_seq_id), (session, custom_loss_seq_id) and, for sampling
sessions, which are made without a future, (session, sampling_session_seq_id).  Each counts within one owner only, so
that nobody is handed the receipt of somebody else's request.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TypeVar

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.engine.futures import FutureTable, Identity, PendingResult
from tinker_core.engine.journalling import RequestHead, decode_head, encode_head, encode_request
from tinker_core.errors import InvalidRequestError, JournalError, TinkerError
from tinker_core.storage.journal import AcceptedRow, Journal
from tinker_core.types import (
    AcceptedRequest,
    Caller,
    CreateCustomLossInput,
    CreateModelInput,
    EngineRequest,
    ForwardBackwardInput,
    LoadWeightsInput,
    OptimStepInput,
    RequestType,
    SampleInput,
    SamplerSaveKind,
    SampleTarget,
    SaveWeightsExternalInput,
    SaveWeightsForSamplerInput,
    SaveWeightsInput,
    UnloadModelInput,
)

_R = TypeVar("_R", bound=EngineRequest)


def model_id_of(session_id: str, model_seq_id: int) -> str:
    """The id of a session's n-th model; the SDK derives the same string."""
    return f"{session_id}:train:{model_seq_id}"


def sampling_session_id_of(session_id: str, sampling_session_seq_id: int) -> str:
    """The id of a session's n-th sampling session."""
    return f"{session_id}:sample:{sampling_session_seq_id}"


def creates_model(request: EngineRequest) -> bool:
    """Whether the request makes a new model, from nothing or from a checkpoint."""
    return isinstance(request, CreateModelInput) or (isinstance(request, LoadWeightsInput) and request.model_id is None)


def model_of(request: EngineRequest) -> str | None:
    """The model a request is about; None for samples and custom losses."""
    if isinstance(request, SampleInput | CreateCustomLossInput):
        return None
    if isinstance(request, CreateModelInput):
        return model_id_of(request.session_id, request.model_seq_id)
    if isinstance(request, LoadWeightsInput) and request.model_id is None:
        if request.session_id is None or request.model_seq_id is None:
            raise InvalidRequestError("load_weights needs either model_id and seq_id, or session_id and model_seq_id")
        return model_id_of(request.session_id, request.model_seq_id)
    return request.model_id


def seq_id_of(request: EngineRequest) -> int:
    """The request's place in its model's order; creations are 0."""
    if isinstance(request, CreateModelInput) or creates_model(request):
        return 0
    if isinstance(request, CreateCustomLossInput | UnloadModelInput):
        raise InvalidRequestError("requests of this type have no place in a model's order")
    seq_id = request.seq_id
    if seq_id is None:
        raise InvalidRequestError("seq_id is missing; number the requests of a model 1, 2, 3, …")
    return seq_id


def type_of(request: EngineRequest) -> RequestType:
    """The request's type."""
    if isinstance(request, ForwardBackwardInput):
        return RequestType.FORWARD if request.forward_only else RequestType.FORWARD_BACKWARD
    return _TYPES[type(request)]


_TYPES: dict[type, RequestType] = {
    CreateModelInput: RequestType.CREATE_MODEL,
    OptimStepInput: RequestType.OPTIM_STEP,
    SaveWeightsInput: RequestType.SAVE_WEIGHTS,
    SaveWeightsForSamplerInput: RequestType.SAVE_WEIGHTS_FOR_SAMPLER,
    SaveWeightsExternalInput: RequestType.SAVE_WEIGHTS_EXTERNAL,
    LoadWeightsInput: RequestType.LOAD_WEIGHTS,
    UnloadModelInput: RequestType.UNLOAD_MODEL,
    SampleInput: RequestType.SAMPLE,
    CreateCustomLossInput: RequestType.CREATE_CUSTOM_LOSS,
}


def identity_of(request: EngineRequest) -> Identity:
    """What makes two submissions of one owner the same request."""
    if isinstance(request, SampleInput):
        return sample_identity(request.sampling_session_id, request.seq_id)
    if isinstance(request, CreateCustomLossInput):
        return f"custom_loss:{request.session_id}", request.custom_loss_seq_id
    if isinstance(request, UnloadModelInput):
        return f"unload:{request.model_id}", 0
    return slot_identity(model_of(request) or "", seq_id_of(request))


def draw_random_choices(request: _R) -> _R:
    """The request with everything drawn that the client left to the server: seeds, and the id of a new loss."""
    if isinstance(request, CreateModelInput) and request.lora_config.seed is None:
        lora = attrs.evolve(request.lora_config, seed=secrets.randbits(62))
        return attrs.evolve(request, lora_config=lora)
    if isinstance(request, SampleInput) and request.sampling_params.seed is None:
        params = attrs.evolve(request.sampling_params, seed=secrets.randbits(62))
        return attrs.evolve(request, sampling_params=params)
    if isinstance(request, CreateCustomLossInput):
        return attrs.evolve(request, loss_id=f"loss-{secrets.token_urlsafe(16)}")
    return request


def slot_identity(model_id: str, seq_id: int) -> Identity:
    """The identity of whatever takes one place in a model's order."""
    return f"model:{model_id}", seq_id


def sample_identity(sampling_session_id: str, seq_id: int) -> Identity:
    """The identity of a sample."""
    return f"sample:{sampling_session_id}", seq_id


@attrs.frozen(kw_only=True)
class Tokens:
    """Tokens of a request's inputs, and the most that it can come to."""

    num: int = 0
    most: int = 0


NO_TOKENS = Tokens()
"""Of requests that carry no data."""


class Acceptance:
    """Turns requests into accepted requests: in the journal, with an open future."""

    def __init__(self, futures: FutureTable, journal: Journal, clock: Clock) -> None:
        self._futures = futures
        self._journal = journal
        self._clock = clock

    async def find(self, owner: str, identity: Identity) -> AcceptedRequest | None:
        """The receipt of the same request by the same owner, if it was accepted lately; the journal has the older ones.

        Raises what kept the first one from being accepted.
        """
        entry = self._futures.find(_owned(owner, identity))
        if entry is None:
            return None
        await asyncio.shield(entry.journalled)
        return entry.accepted

    def is_known(self, owner: str, identity: Identity) -> bool:
        """Whether the same request by the same owner is in memory."""
        return self._futures.find(_owned(owner, identity)) is not None

    async def accept(self, request: _R, caller: Caller, tokens: Tokens) -> tuple[PendingResult, _R] | AcceptedRequest:
        """Accept a request: when this returns it is durable, and it has a result in time, whatever happens.

        Returns its open future and the request with its random choices drawn; or the receipt of the earlier one, if it
        is a repeat.  Raises `JournalFullError` or `JournalError`, and then nothing was accepted.
        """
        request = draw_random_choices(request)
        target = None
        if isinstance(request, SampleInput):
            target = SampleTarget.of(request.sampling_session_id, request.seq_id)
        head = attrs.evolve(
            self._head(type_of(request), caller, identity_of(request)),
            model_id=model_of(request),
            seq_id=None if isinstance(request, _UNORDERED) else seq_id_of(request),
            num_samples=request.num_samples if isinstance(request, SampleInput) else 0,
            target=target,
            num_tokens=tokens.num,
            max_tokens=tokens.most,
            publishes=isinstance(request, SaveWeightsForSamplerInput) and request.path is None,
            moves_inflight=isinstance(request, SaveWeightsForSamplerInput)
            and request.path is None
            and request.kind is SamplerSaveKind.INFLIGHT,
        )
        group = request.session_id if isinstance(request, CreateCustomLossInput) else None
        taken = await self._take(head, await encode_request(request), group)
        return taken if isinstance(taken, AcceptedRequest) else (taken, request)

    async def accept_unreadable(
        self, request_type: RequestType, caller: Caller, model_id: str, seq_id: int
    ) -> PendingResult | AcceptedRequest:
        """Accept the place in a model's order of a request that could not be decoded in full."""
        head = self._head(request_type, caller, slot_identity(model_id, seq_id))
        return await self._take(attrs.evolve(head, model_id=model_id, seq_id=seq_id), None)

    async def accept_unreadable_sample(
        self, sampling_session_id: str, seq_id: int, caller: Caller
    ) -> PendingResult | AcceptedRequest:
        """Accept a sample that could not be decoded in full; it counts as one sequence, which will never be."""
        head = self._head(RequestType.SAMPLE, caller, sample_identity(sampling_session_id, seq_id))
        target = SampleTarget.of(sampling_session_id, seq_id)
        return await self._take(attrs.evolve(head, num_samples=1, target=target), None)

    def reopen(self, head: RequestHead) -> PendingResult:
        """The open future of a request that an earlier process accepted."""
        journalled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        journalled.set_result(None)
        entry = self._entry(head, 0, journalled)
        entry.recovered = True
        self._futures.add(entry)
        return entry

    def _head(self, request_type: RequestType, caller: Caller, identity: Identity) -> RequestHead:
        number = self._journal.next_number()
        scope, place = _owned(caller.owner, identity)
        return RequestHead(
            number=number,
            request_id=self._futures.ids.issue(caller.owner, number),
            request_type=request_type,
            caller=caller,
            scope=scope,
            place=place,
            accepted_at=self._clock.now().timestamp(),
        )

    def _entry(self, head: RequestHead, size: int, journalled: asyncio.Future[None]) -> PendingResult:
        return PendingResult(
            accepted=head.receipt(),
            caller=head.caller,
            key=(head.scope, head.place),
            number=head.number,
            accepted_at=self._clock.monotonic(),
            done=asyncio.get_running_loop().create_future(),
            journalled=journalled,
            seq_id=head.seq_id,
            num_tokens=head.num_tokens,
            size=size,
            publishes=head.publishes,
            target=head.target,
        )

    async def _take(
        self, head: RequestHead, body: bytes | None, group: str | None = None
    ) -> PendingResult | AcceptedRequest:
        """Write a request into the journal. A copy that comes meanwhile waits for the same write."""
        key = (head.scope, head.place)
        first = self._futures.find(key)
        if first is not None:
            await asyncio.shield(first.journalled)
            return first.accepted
        journalled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = self._entry(head, len(body or b""), journalled)
        self._futures.add(entry)
        row = AcceptedRow(
            number=head.number,
            scope=head.scope,
            place=head.place,
            owner=head.caller.owner,
            model_id=head.model_id if head.seq_id is not None else None,
            seq_id=head.seq_id,
            group=group,
            head=encode_head(head),
            body=body,
        )
        try:
            earlier = await self._journal.accept(row)
        except BaseException as error:
            self._futures.remove(entry)
            journalled.set_exception(error if isinstance(error, TinkerError) else JournalError("it was not kept"))
            journalled.exception()  # perhaps nobody waits for it
            raise
        if earlier is not None:
            self._futures.remove(entry)
            journalled.set_result(None)
            return decode_head(earlier).receipt()
        journalled.set_result(None)
        return entry


_UNORDERED = (SampleInput, CreateCustomLossInput, UnloadModelInput)
"""Requests that have no place in the order of a model."""


def sample_scope(owner: str, sampling_session_id: str) -> str:
    """What the samples of an owner's sampling session are numbered in."""
    return _owned(owner, sample_identity(sampling_session_id, 0))[0]


def _owned(owner: str, identity: Identity) -> Identity:
    return f"{owner}\n{identity[0]}", identity[1]
