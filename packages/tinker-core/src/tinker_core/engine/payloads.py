"""The bodies of requests that have to run: in memory while they are new, otherwise in the journal until their turn."""

from __future__ import annotations

import attrs

from tinker_core.engine.journalling import read_request
from tinker_core.storage.journal import Journal
from tinker_core.types import CheckpointRecord, EngineRequest, LoadWeightsInput, TrainingRunRecord


@attrs.frozen(kw_only=True)
class NewModel:
    """A model to create, with the checkpoint to fill it from if there is one."""

    run: TrainingRunRecord
    load: LoadWeightsInput | None = None
    checkpoint: CheckpointRecord | None = None


Payload = EngineRequest | NewModel


MEMORY_BYTES = 512 * 1024**2
"""About how many bytes of bodies wait for their turn in memory; those beyond are read from the journal."""


class Payloads:
    """What each request that waits or runs asks for."""

    def __init__(self, journal: Journal, max_memory: int = MEMORY_BYTES) -> None:
        self._journal = journal
        self._max_memory = max_memory
        self._present: dict[str, Payload] = {}
        self._sizes: dict[str, int] = {}
        self._num_bytes = 0
        self._stored: dict[str, int] = {}
        """Numbers of those that only the journal has."""
        self._again: set[str] = set()
        self._replays: set[str] = set()

    def take_in(self, request_id: str, request: EngineRequest, *, number: int, size: int) -> None:
        """Keep what a new request asks for until its turn: in memory, if there is room for its ``size`` in bytes."""
        if self._num_bytes + size > self._max_memory:
            self._stored[request_id] = number
        else:
            self._sizes[request_id] = size
            self._num_bytes += size
            self._present[request_id] = request

    def keep(self, request_id: str, payload: Payload) -> None:
        """Keep what a request asks for whose turn has come, or which makes a model."""
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
        self._num_bytes -= self._sizes.pop(request_id, 0)
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
        return await read_request(self._journal, self._stored[request_id])

    def get(self, request_id: str) -> Payload:
        """What a request asks for, once it is in memory."""
        return self._present[request_id]
