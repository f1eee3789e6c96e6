"""The usage ledger and the audit log: each amount once, written behind the backs of requests."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import attrs
import pytest

from tests.core.conftest import ManualClock
from tinker_core.engine.audit import AuditLog
from tinker_core.engine.usage import FLUSH_SECONDS, Metered, UsageLedger
from tinker_core.errors import StorageError
from tinker_core.storage import ControlStore, database_url
from tinker_core.types import (
    Caller,
    CheckpointRecord,
    CheckpointType,
    EngineOutput,
    ForwardBackwardOutput,
    GeneratedSequence,
    LoraConfig,
    OptimizerConfig,
    OptimStepOutput,
    RequestError,
    SampleOutput,
    SaveWeightsOutput,
    StopReason,
    TinkerPath,
    UsageKind,
    UsageRecord,
)

ANN = Caller(owner="ann", key_id="key-1")
REQUEST = Metered(
    caller=ANN,
    base_model="tiny",
    num_tokens=10,
    session_id="s",
    run_id="s:train:0",
    project_id="p",
    model_id="s:train:0",
)
PASS = ForwardBackwardOutput(loss_fn_outputs=(), metrics={})
SAMPLE = SampleOutput(
    sequences=tuple(
        GeneratedSequence(stop_reason=StopReason.LENGTH, tokens=tokens, logprobs=()) for tokens in ((1, 2), (3, 4, 5))
    ),
    prompt_cache_hit_tokens=4,
)


@attrs.frozen
class Lab:
    control: ControlStore
    clock: ManualClock

    async def totals(self, owner: str | None = None) -> Counter[UsageKind]:
        """What the database holds, without asking the ledger to write first."""
        now = self.clock.now()
        found = await self.control.usage.list(now - timedelta(days=1), now + timedelta(days=1), owner)
        totals: Counter[UsageKind] = Counter()
        for record in found:
            totals[record.kind] += record.quantity
        return totals


def run(tmp_path: Path, body: Callable[[Lab], Awaitable[None]]) -> None:
    async def main() -> None:
        control = await ControlStore.open(database_url(tmp_path))
        try:
            await body(Lab(control, ManualClock()))
        finally:
            await control.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (PASS, {UsageKind.TRAINING: 10}),
        (SAMPLE, {UsageKind.PREFILL: 6, UsageKind.CACHED_PREFILL: 4, UsageKind.SAMPLE: 5}),
        (SaveWeightsOutput(path="tinker://s:train:0/weights/a"), {UsageKind.CHECKPOINT: 1}),
        (SaveWeightsOutput(sampling_session_id="s:sample:0"), {}),
        (OptimStepOutput(metrics={}), {}),
        (RequestError(category="user", code="X", message=""), {}),
    ],
)
def test_results_are_counted_by_what_they_are(
    tmp_path: Path, output: EngineOutput, expected: dict[UsageKind, int]
) -> None:
    async def body(lab: Lab) -> None:
        async with UsageLedger(lab.control.usage, lab.clock) as ledger:
            ledger.count_result(REQUEST, output)
        assert await lab.totals() == expected

    run(tmp_path, body)


def test_amounts_meet_in_one_row_by_everything_but_the_amount(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        others = [
            attrs.evolve(REQUEST, caller=Caller(owner="ann", key_id="key-2")),
            attrs.evolve(REQUEST, caller=Caller(owner="ben")),
            attrs.evolve(REQUEST, project_id=None),
            attrs.evolve(REQUEST, run_id="s:train:1"),
            attrs.evolve(REQUEST, base_model="other"),
        ]
        for _ in range(3):  # each opening of the ledger writes for itself
            async with UsageLedger(lab.control.usage, lab.clock) as ledger:
                for request in (REQUEST, REQUEST, *others):
                    ledger.count_result(request, PASS)
        async with UsageLedger(lab.control.usage, lab.clock) as ledger:
            await lab.clock.advance(3600)
            ledger.count_result(REQUEST, PASS)
            now = lab.clock.now()
            found = await ledger.between(now - timedelta(hours=1), now + timedelta(hours=1))
            assert sorted(record.quantity for record in found) == [10, 30, 30, 30, 30, 30, 60]
            assert {record.quantity for record in await ledger.between(now, now + timedelta(hours=1))} == {10}
            assert {record.owner for record in await ledger.between(now - timedelta(hours=1), now, "ben")} == {"ben"}

    run(tmp_path, body)


def test_requests_do_not_wait_and_amounts_are_written_soon(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        written = asyncio.Event()
        add = lab.control.usage.add

        async def noticed(records: list[UsageRecord]) -> None:
            await add(records)
            written.set()

        lab.control.usage.add = noticed  # type: ignore[method-assign, assignment]
        async with UsageLedger(lab.control.usage, lab.clock) as ledger:
            for _ in range(100):
                ledger.count_result(REQUEST, PASS)
            assert await lab.totals() == {}
            await lab.clock.advance(FLUSH_SECONDS)
            await written.wait()
            assert await lab.totals() == {UsageKind.TRAINING: 1000}

    run(tmp_path, body)


def test_a_failed_write_loses_nothing(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        add = lab.control.usage.add

        async def fail(records: list[UsageRecord]) -> None:
            lab.control.usage.add = add  # type: ignore[method-assign]
            raise StorageError("disk full")

        async with UsageLedger(lab.control.usage, lab.clock) as ledger:
            ledger.count_result(REQUEST, PASS)
            lab.control.usage.add = fail  # type: ignore[method-assign, assignment]
            now = lab.clock.now()
            with pytest.raises(StorageError, match="disk full"):
                await ledger.between(now, now)
            ledger.count_result(REQUEST, PASS)
        assert await lab.totals() == {UsageKind.TRAINING: 20}

    run(tmp_path, body)


def test_a_removed_checkpoint_leaves_its_bytes_and_its_time(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        start = lab.clock.now()
        checkpoint = CheckpointRecord(
            path=TinkerPath(run_id="s:train:0", kind=CheckpointType.TRAINING, name="a"),
            base_model="tiny",
            lora_config=LoraConfig(rank=4),
            optimizer_config=OptimizerConfig(),
            created_at=start,
            size_bytes=1000,
            request_id="r",
            owner="ann",
        )
        end = start + timedelta(hours=5)
        async with UsageLedger(lab.control.usage, lab.clock) as ledger:
            ledger.checkpoint_removed(checkpoint, end)
            expired = attrs.evolve(checkpoint, expires_at=start + timedelta(hours=1))
            ledger.checkpoint_removed(expired, end)
            found = await ledger.between(start + timedelta(hours=2), end)
            assert [(record.starts_at, record.ends_at, record.quantity) for record in found] == [(start, end, 1000)]
            assert found[0].session_id == "s"

    run(tmp_path, body)


def test_the_audit_log_is_read_by_category_and_time_and_by_its_owner_only(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        start = lab.clock.now()
        async with AuditLog(lab.control.audit, lab.clock) as audit:
            audit.record("checkpoint_saved", owner="ann", key_id="key-1", details={"tinker_path": "tinker://a"})
            audit.record("project_assigned", owner="ann", project_id="p")
            audit.record("checkpoint_saved", owner="ben")
            await lab.clock.advance(3600)
            audit.record("key_revoked", owner="ann")
            end = lab.clock.now()
            first, second = await audit.entries("ann", start, end)
            assert (first.event, first.details) == (
                "checkpoint_saved",
                {"key_id": "key-1", "tinker_path": "tinker://a"},
            )
            assert (second.category, second.project_id) == ("projects", "p")
            assert len(await audit.entries("ann", start, end + timedelta(seconds=1))) == 3
            (only,) = await audit.entries("ann", start, end, "checkpoints")
            assert only == first

    run(tmp_path, body)
