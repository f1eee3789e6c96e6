"""The usage ledger: what each key used, by project, run and hour."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from typing import Self

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.engine.write_behind import WriteBehind
from tinker_core.storage.usage import UsageStore
from tinker_core.types import (
    Caller,
    CheckpointRecord,
    EngineOutput,
    ForwardBackwardOutput,
    RequestError,
    SampleOutput,
    SaveWeightsOutput,
    UsageKind,
    UsageRecord,
    session_of_run,
)

FLUSH_SECONDS = 2.0
"""How long amounts gather in memory; what a crash can lose."""


@attrs.frozen(kw_only=True)
class Metered:
    """What is known of a request when it is accepted, and needed when it is counted."""

    caller: Caller
    base_model: str
    num_tokens: int = 0
    """Tokens of its inputs: of the data of a pass, of the prompt of a sample."""
    max_tokens: int = 0
    """Most tokens that it can come to, generated ones included."""
    model_id: str | None = None
    """The model in whose order it runs; None for samples, which run in none."""
    session_id: str | None = None
    run_id: str | None = None
    project_id: str | None = None


class UsageLedger:
    """Adds up amounts in memory and writes the sums now and then; requests never wait for it."""

    def __init__(self, store: UsageStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._amounts: Counter[UsageRecord] = Counter()
        """Amounts by a record that holds everything else, with a quantity of 0."""
        self._writer = WriteBehind(self._write, clock, delay=FLUSH_SECONDS)

    async def __aenter__(self) -> Self:
        await self._writer.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._writer.__aexit__(*error)

    def count_result(self, request: Metered, output: EngineOutput) -> None:
        """Count a request by its result, once; a failed one used nothing."""
        if isinstance(output, RequestError):
            return
        if isinstance(output, ForwardBackwardOutput):
            self._count(UsageKind.TRAINING, request.num_tokens, request)
        elif isinstance(output, SampleOutput):
            cached = min(output.prompt_cache_hit_tokens, request.num_tokens)
            self._count(UsageKind.PREFILL, request.num_tokens - cached, request)
            self._count(UsageKind.CACHED_PREFILL, cached, request)
            self._count(UsageKind.SAMPLE, sum(len(sequence.tokens) for sequence in output.sequences), request)
        elif isinstance(output, SaveWeightsOutput) and output.path is not None:
            self._count(UsageKind.CHECKPOINT, 1, request)

    def checkpoint_removed(self, record: CheckpointRecord, at: datetime) -> None:
        """Count how long a checkpoint that is no more was stored."""
        self._add(storage_of(record, at))

    async def between(self, after: datetime, before: datetime, owner: str | None = None) -> list[UsageRecord]:
        """What was used in a time, by one owner or by all; without the checkpoints that still exist."""
        await self._writer.flush()
        return await self._store.list(after, before, owner)

    def _count(self, kind: UsageKind, quantity: int, request: Metered) -> None:
        hour = self._clock.now().replace(minute=0, second=0, microsecond=0)
        self._add(
            UsageRecord(
                kind=kind,
                owner=request.caller.owner,
                base_model=request.base_model,
                starts_at=hour,
                ends_at=hour + timedelta(hours=1),
                quantity=quantity,
                key_id=request.caller.key_id,
                project_id=request.project_id,
                session_id=request.session_id,
                run_id=request.run_id,
            )
        )

    def _add(self, record: UsageRecord) -> None:
        if record.quantity == 0:
            return
        self._amounts[attrs.evolve(record, quantity=0)] += record.quantity
        self._writer.announce()

    async def _write(self) -> None:
        taken, self._amounts = self._amounts, Counter()
        if not taken:
            return
        try:
            await self._store.add([attrs.evolve(record, quantity=amount) for record, amount in taken.items()])
        except BaseException:
            self._amounts.update(taken)
            raise


def storage_of(record: CheckpointRecord, until: datetime) -> UsageRecord:
    """The bytes of a checkpoint from when it was saved until a moment, or until it expired."""
    ends_at = until if record.expires_at is None else min(until, record.expires_at)
    return UsageRecord(
        kind=UsageKind.STORAGE,
        owner=record.owner,
        base_model=record.base_model,
        starts_at=record.created_at,
        ends_at=max(ends_at, record.created_at),
        quantity=record.size_bytes,
        project_id=record.project_id,
        session_id=session_of_run(record.path.run_id),
        run_id=record.path.run_id,
    )
