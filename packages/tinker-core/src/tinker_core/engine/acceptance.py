"""The single place where a request is accepted: after it, the request has an id and all its random choices.

A repeat of a request (a client that lost our answer sends it again) gets the first one's receipt.  The identities are
(model, seq_id), (sampling session, seq_id), (session, model_seq_id), (session, custom_loss_seq_id) and, for sampling
sessions, which are made without a future, (session, sampling_session_seq_id).  Each counts within one owner only, so
that nobody is handed the receipt of somebody else's request.
"""

from __future__ import annotations

import secrets
from collections.abc import Hashable
from typing import TypeVar

import attrs

from tinker_core.engine.futures import FutureTable, PendingResult
from tinker_core.errors import InvalidRequestError
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


def identity_of(request: EngineRequest) -> Hashable:
    """What makes two submissions the same request."""
    if isinstance(request, SampleInput):
        return sample_identity(request.sampling_session_id, request.seq_id)
    if isinstance(request, CreateCustomLossInput):
        return ("custom_loss", request.session_id, request.custom_loss_seq_id)
    if isinstance(request, UnloadModelInput):
        return ("unload", request.model_id)
    return slot_identity(model_of(request) or "", seq_id_of(request))


def draw_random_choices(request: _R) -> _R:
    """The request with every seed that the client left to the server."""
    if isinstance(request, CreateModelInput) and request.lora_config.seed is None:
        lora = attrs.evolve(request.lora_config, seed=secrets.randbits(62))
        return attrs.evolve(request, lora_config=lora)
    if isinstance(request, SampleInput) and request.sampling_params.seed is None:
        params = attrs.evolve(request.sampling_params, seed=secrets.randbits(62))
        return attrs.evolve(request, sampling_params=params)
    return request


def slot_identity(model_id: str, seq_id: int) -> Hashable:
    """The identity of whatever takes one place in a model's order."""
    return ("model", model_id, seq_id)


def sample_identity(sampling_session_id: str, seq_id: int) -> Hashable:
    """The identity of a sample."""
    return ("sample", sampling_session_id, seq_id)


class Acceptance:
    """Turns requests into accepted requests with an open future."""

    def __init__(self, futures: FutureTable) -> None:
        self._futures = futures

    def find(self, owner: str, identity: Hashable) -> AcceptedRequest | None:
        """The receipt of the same request by the same owner, if it was accepted before."""
        return self._futures.find((owner, identity))

    def accept(self, request: _R, caller: Caller) -> tuple[PendingResult, _R]:
        """Accept a request that is not a repeat: from here on it has a result, whatever happens.

        Returns its open future and the request with its random choices drawn.
        """
        num_samples = request.num_samples if isinstance(request, SampleInput) else 0
        target = None
        if isinstance(request, SampleInput):
            target = SampleTarget.of(request.sampling_session_id, request.seq_id)
        entry = self._open(type_of(request), caller, identity_of(request), model_of(request), num_samples, target)
        return entry, draw_random_choices(request)

    def accept_unreadable(self, request_type: RequestType, caller: Caller, model_id: str, seq_id: int) -> PendingResult:
        """Accept the place in a model's order of a request that could not be decoded in full."""
        return self._open(request_type, caller, slot_identity(model_id, seq_id), model_id, 0)

    def accept_unreadable_sample(self, sampling_session_id: str, seq_id: int, caller: Caller) -> PendingResult:
        """Accept a sample that could not be decoded in full; it counts as one sequence, which will never be."""
        target = SampleTarget.of(sampling_session_id, seq_id)
        return self._open(RequestType.SAMPLE, caller, sample_identity(sampling_session_id, seq_id), None, 1, target)

    def _open(
        self,
        request_type: RequestType,
        caller: Caller,
        identity: Hashable,
        model_id: str | None,
        num_samples: int,
        target: SampleTarget | None = None,
    ) -> PendingResult:
        request_id = self._futures.ids.issue(caller.owner)
        accepted = AcceptedRequest(
            request_id=request_id,
            request_type=request_type,
            model_id=model_id,
            sample_sequence_ids=tuple(f"{request_id}:{i}" for i in range(num_samples)) or None,
        )
        return self._futures.add(accepted, caller, (caller.owner, identity), target)
