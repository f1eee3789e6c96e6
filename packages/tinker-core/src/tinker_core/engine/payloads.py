"""The bodies of requests that have to run: in memory while they are new, otherwise in the journal until their turn."""

from __future__ import annotations

import attrs

from tinker_core.engine.journalling import decode_request
from tinker_core.errors import DamagedRecordError
from tinker_core.storage.journal import Journal
from tinker_core.types import CheckpointRecord, EngineRequest, LoadWeightsInput, TrainingRunRecord


@attrs.frozen(kw_only=True)
class NewModel:
    """A model to create, with the checkpoint to fill it from if there is one."""

    run: TrainingRunRecord
    load: LoadWeightsInput | None = None
    checkpoint: CheckpointRecord | None = None


Payload = EngineRequest | NewModel


class Payloads:
    """What each request that waits or runs asks for."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._present: dict[str, Payload] = {}
        self._stored: dict[str, int] = {}
        """Numbers of those that only the journal has."""
        self._again: set[str] = set()
        self._replays: set[str] = set()

    def keep(self, request_id: str, payload: Payload) -> None:
        """Keep what a new request asks for until its turn."""
        self._present[request_id] = payload

    def recall(self, request_id: str, number: int, *, replay: bool) -> None:
        """Have a request run, perhaps again, whose body is in the journal.

        A ``replay`` has its result already, and must come to the same end as before.
        """
        self._stored[request_id] = number
        self._again.add(request_id)
        if replay:
            self._replays.add(request_id)

    def discard(self, request_id: str) -> None:
        """Forget a request that needs not run, or not again for now."""
        self._present.pop(request_id, None)
        self._stored.pop(request_id, None)
        self._again.discard(request_id)
        self._replays.discard(request_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._present or request_id in self._stored

    def is_replay(self, request_id: str) -> bool:
        """Whether a request runs although it has its result."""
        return request_id in self._replays

    def is_again(self, request_id: str) -> bool:
        """Whether a request may have run before."""
        return request_id in self._again

    def is_recalled(self, request_id: str) -> bool:
        """Whether a request has yet to be read and checked."""
        return request_id in self._stored and request_id not in self._present

    async def read(self, request_id: str) -> EngineRequest:
        """The body that the journal has of a request. Raises `DamagedRecordError`."""
        number = self._stored[request_id]
        body = await self._journal.body(number)
        if body is None:
            raise DamagedRecordError(f"the journal has lost the body of request {request_id} (record {number})")
        return decode_request(body)

    def get(self, request_id: str) -> Payload:
        """What a request asks for, once it is in memory."""
        return self._present[request_id]
