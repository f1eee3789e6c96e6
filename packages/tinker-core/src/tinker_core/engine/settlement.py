"""Results: into the journal first, then to whoever waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import attrs

from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.futures import FutureTable, PendingResult
from tinker_core.engine.journalling import encode_record
from tinker_core.engine.model_state import done_of
from tinker_core.engine.payloads import Payloads
from tinker_core.errors import SkippedSequenceError
from tinker_core.storage.journal import Fate, Journal, ModelRow, ResultRow
from tinker_core.types import EngineOutput, RequestError, RequestType

log = logging.getLogger(__name__)

_CHANGING = (RequestType.CREATE_MODEL, RequestType.FORWARD_BACKWARD, RequestType.OPTIM_STEP)
"""What changes a model so that it has to be done again; a load is covered by a snapshot of its own."""


def fate_of(entry: PendingResult, output: EngineOutput, *, in_order: bool) -> Fate:
    """What becomes of a request's body, now that it has its result.

    ``in_order`` says whether the request has its place in the order of a live model.
    """
    failed = isinstance(output, RequestError)
    kind = entry.accepted.request_type
    if kind is RequestType.CREATE_CUSTOM_LOSS and not failed:
        return Fate.KEEP
    if not in_order or (isinstance(output, RequestError) and output.code == SkippedSequenceError.__name__):
        return Fate.DROP
    return Fate.KEEP if not failed and (kind in _CHANGING or entry.publishes) else Fate.PLACE


@attrs.frozen(kw_only=True, eq=False)
class Settlement:
    """Gives every request its result, once. A result is durable before anybody sees it."""

    _futures: FutureTable
    _journal: Journal
    _payloads: Payloads
    _bases: Mapping[str, BaseModel]
    _deliver: Callable[[PendingResult, EngineOutput], None]
    """Told of each result that counts."""
    _run_behind: Callable[[Coroutine[Any, Any, None]], object]

    def __call__(self, request_id: str, output: EngineOutput, cover: ModelRow | None = None) -> None:
        """Set a result, unless there is one; ``cover`` becomes what the journal knows of the model together with it."""
        self._payloads.discard(request_id)
        entry = self._futures.settle(request_id)
        if entry is None:
            return
        base = self._bases.get(entry.base_model)
        model_id, seq_id = entry.accepted.model_id, entry.seq_id
        if base is not None and model_id is not None and seq_id is not None and base.residence.knows(model_id):
            fate = fate_of(entry, output, in_order=True)
            if fate is not Fate.DROP:
                base.residence.note_done(model_id, done_of(entry, model_id, seq_id, fate))
        else:
            fate = fate_of(entry, output, in_order=False)
        if base is not None and cover is not None:
            base.residence.cover(cover)
        row = ResultRow(
            number=entry.number,
            owner=entry.owner,
            payload=encode_record(output),
            fate=fate,
            keep_until=self._futures.keep_until(),
        )
        durable = self._journal.resolve([row], [cover] if cover is not None else [])
        durable.add_done_callback(lambda future: self._count(future, entry, output, cover))

    def _count(
        self, durable: asyncio.Future[None], entry: PendingResult, output: EngineOutput, cover: ModelRow | None
    ) -> None:
        if durable.cancelled():
            return
        error = durable.exception()
        if error is not None:
            # The engine stops: the journal has said so to everybody. The request runs again after the next start.
            log.error("the result of request %s could not be kept: %s", entry.accepted.request_id, error)
            return
        base = self._bases.get(entry.base_model)
        if cover is not None and base is not None:
            self._run_behind(base.residence.drop_replaced(cover.model_id))
        self._futures.resolve(entry, output)
        self._deliver(entry, output)
