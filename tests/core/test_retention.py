"""Results in memory within bounds: whose leave it, and that the journal has them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from tinker_core.engine.acceptance import NO_TOKENS, Acceptance
from tinker_core.engine.clock import SystemClock
from tinker_core.engine.futures import FutureTable
from tinker_core.engine.journalling import encode_record
from tinker_core.engine.request_ids import RequestIds
from tinker_core.engine.retention import size_of
from tinker_core.errors import UnknownRequestError
from tinker_core.storage.journal import Fate, Journal, ResultRow
from tinker_core.types import (
    AcceptedRequest,
    Caller,
    EngineOutput,
    ForwardBackwardOutput,
    GeneratedSequence,
    OptimStepInput,
    OptimStepOutput,
    RequestError,
    SampleOutput,
    StopReason,
    TensorData,
)

RESULT = ForwardBackwardOutput(
    loss_fn_outputs=({"logprobs": TensorData.from_numpy(np.zeros(25_000, np.float32))},), metrics={}
)
"""About 100 kB."""


class Table:
    """A future table over a real journal, with one result after the other."""

    def __init__(self, journal: Journal, max_memory: int) -> None:
        self._journal = journal
        clock = SystemClock()
        self.futures = FutureTable(clock, RequestIds(bytes(32)), journal, max_memory)
        self._acceptance = Acceptance(self.futures, journal, clock)
        self._number = 0

    async def result(self, owner: str) -> str:
        self._number += 1
        step = OptimStepInput(model_id="m", seq_id=self._number)
        accepted = await self._acceptance.accept(step, Caller(owner=owner), NO_TOKENS)
        assert not isinstance(accepted, AcceptedRequest)
        entry, _ = accepted
        row = ResultRow(
            number=entry.number,
            owner=owner,
            payload=encode_record(RESULT),
            fate=Fate.PLACE,
            keep_until=self.futures.keep_until(),
        )
        await self._journal.resolve([row])
        self.futures.resolve(entry, RESULT)
        return entry.accepted.request_id

    def in_memory(self, *request_ids: str) -> list[bool]:
        return [self.futures.entry(request_id) is not None for request_id in request_ids]


@asynccontextmanager
async def open_table(directory: Path, max_memory: int) -> AsyncIterator[Table]:
    journal = await Journal.open(directory, max_bytes=10**9)
    yield Table(journal, max_memory)
    await journal.close()


def test_who_keeps_most_leaves_memory_first_and_loses_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_table(tmp_path, 1_000_000) as table:
            modest = [await table.result("a") for _ in range(3)]
            greedy = [await table.result("b") for _ in range(30)]
            assert table.in_memory(*modest) == [True] * 3
            present = table.in_memory(*greedy)
            assert present == sorted(present)
            assert 4 <= sum(present) <= 7
            for request_id in greedy:
                stored = await table.futures.wait(request_id, "b", 0.0)
                assert stored is not None
                assert encode_record(stored) == encode_record(RESULT)
            with pytest.raises(UnknownRequestError):
                await table.futures.wait(greedy[0], "a", 0.0)

    asyncio.run(run())


def test_results_that_were_fetched_go_before_others(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_table(tmp_path, 450_000) as table:
            first, second, third = [await table.result("a") for _ in range(3)]
            await table.futures.wait(second, "a", 0.0)
            await table.result("a")
            await table.result("a")
            assert table.in_memory(first, second, third) == [True, False, True]

    asyncio.run(run())


def test_the_newest_result_is_in_memory(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_table(tmp_path, 1) as table:
            old, new = await table.result("a"), await table.result("b")
            assert table.in_memory(old, new) == [False, True]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("output", "least"),
    [
        (RESULT, 100_000),
        (OptimStepOutput(metrics={}), 1000),
        (RequestError(category="user", code="x", message="y" * 5000), 5000),
        (
            SampleOutput(
                sequences=(GeneratedSequence(stop_reason=StopReason.STOP, tokens=(1,) * 1000, logprobs=(0.5,) * 1000),)
            ),
            64_000,
        ),
    ],
)
def test_sizes_are_not_underestimated(output: EngineOutput, least: int) -> None:
    assert size_of(output) >= least
