"""What an earlier process left in the journal becomes live again, before any worker runs.

Bodies stay in the journal until their turn, so that this takes a moment however much is waiting.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping

import attrs

from tinker_core.engine.acceptance import Acceptance
from tinker_core.engine.admission import Admission
from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.clock import Clock
from tinker_core.engine.futures import PendingResult
from tinker_core.engine.intake import Intake
from tinker_core.engine.journalling import RequestHead, decode_head, decode_request, read_request
from tinker_core.engine.limits import KeyLimiter
from tinker_core.engine.model_state import Done, inflight_of, queued
from tinker_core.engine.operations import Resolve
from tinker_core.engine.payloads import Payloads
from tinker_core.engine.registry import Registry
from tinker_core.engine.sampling import Sampling
from tinker_core.engine.usage import Metered
from tinker_core.errors import DamagedRecordError, TinkerError, UnknownModelError, WorkerLostError
from tinker_core.executors.rank_loop import describe_error
from tinker_core.storage.journal import Fate, Journal, ModelRow, PendingRow, Recovered, ReplayRow
from tinker_core.types import CreateCustomLossInput, RequestType, SampleInput, TrainingRunRecord

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 20
"""How often servers may die while a request from before their start runs; then the request is what kills them.

Requests run in workers, so few can do that, while a machine that is switched off and on again and again is innocent.
"""
_CREATING = (RequestType.CREATE_MODEL, RequestType.LOAD_WEIGHTS)


@attrs.frozen(kw_only=True, eq=False)
class Recovery:
    """Rebuilds models, queues and open futures from the journal."""

    _journal: Journal
    _registry: Registry
    _acceptance: Acceptance
    _admission: Admission
    _limiter: KeyLimiter
    _payloads: Payloads
    _sampling: Sampling
    _intake: Intake
    _clock: Clock
    _bases: Mapping[str, BaseModel]
    _resolve: Resolve
    _unserved: set[str] = attrs.field(init=False, factory=set)
    """Models whose base model this server does not serve now."""

    async def run(self, left: Recovered) -> None:
        """Put back what an earlier process left."""
        for name in left.damaged:
            log.error("the journal is damaged: %s; it is not used", name)
        await self._restore_losses(left)
        replays: defaultdict[str, list[ReplayRow]] = defaultdict(list)
        for replay in left.replay:
            replays[replay.model_id].append(replay)
        for model in left.models:
            await self._restore_model(model, replays[model.model_id], damaged=model.model_id in left.damaged_models)
        pending = [(row, decode_head(row.head)) for row in left.pending]
        # Creations first: what follows them in their models' order needs a queue.
        for row, head in sorted(pending, key=lambda pair: (not _creates(pair[1]), pair[0].number)):
            await self._reopen(row, head)
        if left.models or left.pending:
            log.info("found %d models and %d unfinished requests in the journal", len(left.models), len(left.pending))

    async def _restore_losses(self, left: Recovered) -> None:
        for row in left.groups:
            body = await self._journal.body(row.number)
            request = decode_request(body) if body is not None else None
            if isinstance(request, CreateCustomLossInput):
                self._admission.create_custom_loss(request)

    # --- models -------------------------------------------------------------------------------------------------------

    async def _restore_model(self, row: ModelRow, replays: list[ReplayRow], *, damaged: bool) -> None:
        run = await self._registry.control.get_run(row.model_id)
        base = self._bases.get(run.base_model) if run is not None else None
        if run is None or base is None:
            log.error(
                "model %s cannot be served: %s; it stays in the journal",
                row.model_id,
                "its record is not in the control database" if run is None else f"{run.base_model!r} is not served",
            )
            self._unserved.add(row.model_id)
            return
        self._registry.add_model(run)
        self._registry.saw(run.session_id, self._clock.monotonic())
        base.restore_model(row, run.owner)
        inflight = inflight_of(row)
        for replay in replays:
            head = decode_head(replay.head)
            base.residence.note_done(row.model_id, _done(replay, head))
            if head.moves_inflight and replay.fate is Fate.KEEP:
                inflight = f"{row.model_id}@{head.request_id}"
        if inflight is not None:
            self._registry.inflight[row.model_id] = inflight
        base.residence.rewind(row.model_id)
        if damaged:
            error = DamagedRecordError("a journalled request of it is damaged; see the server's log")
            base.residence.lose(row.model_id, error)

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _reopen(self, row: PendingRow, head: RequestHead) -> None:
        entry = self._acceptance.reopen(head)
        if head.model_id in self._unserved:
            return  # its client goes on waiting, for a server that serves the base model again
        try:
            if row.attempts >= MAX_ATTEMPTS:
                raise WorkerLostError(f"the request is given up: the server died {row.attempts} times while it ran")
            if not row.has_body:
                raise WorkerLostError("the request could not be read, and the server stopped before it could say so")
            if head.request_type is RequestType.SAMPLE:
                await self._resume_sample(head, entry)
            elif head.seq_id is None or _creates(head):
                await self._intake.route(await read_request(self._journal, head.number), entry)
            else:
                self._requeue(head, entry)
        except TinkerError as error:
            self._resolve(head.request_id, describe_error(error))

    def _requeue(self, head: RequestHead, entry: PendingResult) -> None:
        """Back into its model's queue; it is read and checked when its turn comes."""
        assert head.model_id is not None
        assert head.seq_id is not None
        base, run = self._base_of_model(head.model_id)
        entry.base_model = base.spec.name
        if run is not None:
            self._intake.begin(entry, run)
        self._payloads.recall(head.request_id, head.number, replay=False)
        base.submit(queued(entry.accepted, head.model_id, head.seq_id, head.num_tokens))

    def _base_of_model(self, model_id: str) -> tuple[BaseModel, TrainingRunRecord | None]:
        """Where a model lives, or will once its creation, which waits in its queue, has run."""
        for base in self._bases.values():
            if base.residence.knows(model_id):
                run = self._registry.model(model_id) if self._registry.is_live(model_id) else None
                return base, run
        raise UnknownModelError(model_id)

    async def _resume_sample(self, head: RequestHead, entry: PendingResult) -> None:
        assert head.target is not None
        record = await self._registry.sampler(head.target.sampling_session_id, head.caller.owner)
        base = self._bases.get(record.base_model)
        if base is None:
            log.error("sample %s waits: %r is not served by this server", head.request_id, record.base_model)
            return
        entry.base_model = record.base_model
        self._limiter.begin(
            head.request_id,
            Metered(
                caller=head.caller,
                base_model=record.base_model,
                num_tokens=head.num_tokens,
                max_tokens=head.max_tokens,
                session_id=record.session_id,
                run_id=base.run_of(record),
                project_id=record.project_id,
            ),
        )

        async def load() -> SampleInput:
            await self._journal.note_attempts([head.number])
            request = await read_request(self._journal, head.number)
            assert isinstance(request, SampleInput)
            return request

        self._sampling.resume(entry, load, record, base)


def _creates(head: RequestHead) -> bool:
    return head.seq_id == 0 and head.request_type in _CREATING


def _done(row: ReplayRow, head: RequestHead) -> Done:
    request = queued(head.receipt(), row.model_id, row.seq_id, head.num_tokens)
    return Done(number=row.number, request=request, fate=row.fate, publishes=head.publishes)
