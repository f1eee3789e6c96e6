"""Kept results within bounds: who loses what."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tinker_core.engine.clock import SystemClock
from tinker_core.engine.futures import FutureTable
from tinker_core.engine.request_ids import RequestIds
from tinker_core.engine.retention import size_of
from tinker_core.errors import ResultGoneError
from tinker_core.types import (
    AcceptedRequest,
    Caller,
    EngineOutput,
    ForwardBackwardOutput,
    GeneratedSequence,
    OptimStepOutput,
    RequestError,
    RequestType,
    SampleOutput,
    StopReason,
    TensorData,
)

RESULT = ForwardBackwardOutput(
    loss_fn_outputs=({"logprobs": TensorData.from_numpy(np.zeros(25_000, np.float32))},), metrics={}
)
"""About 100 kB."""


class Table:
    """A future table with one result after the other."""

    def __init__(self, max_bytes: int) -> None:
        self.ids = RequestIds(bytes(32))
        self.futures = FutureTable(SystemClock(), self.ids, max_bytes)
        self._number = 0

    def result(self, owner: str, output: EngineOutput = RESULT) -> str:
        self._number += 1
        request_id = self.ids.issue(owner)
        accepted = AcceptedRequest(request_id=request_id, request_type=RequestType.FORWARD)
        self.futures.add(accepted, Caller(owner=owner), ("model", owner, self._number))
        self.futures.resolve(request_id, output)
        return request_id

    async def kept(self, owner: str, *request_ids: str) -> list[bool]:
        return [await self._is_kept(owner, request_id) for request_id in request_ids]

    async def _is_kept(self, owner: str, request_id: str) -> bool:
        try:
            return self.futures.get(request_id, owner) is not None
        except ResultGoneError:
            return False


def test_who_keeps_most_loses_the_oldest_first() -> None:
    async def run() -> None:
        table = Table(max_bytes=1_000_000)
        modest = [table.result("a") for _ in range(3)]
        greedy = [table.result("b") for _ in range(30)]
        assert await table.kept("a", *modest) == [True] * 3
        kept = await table.kept("b", *greedy)
        assert kept == sorted(kept)
        assert 4 <= sum(kept) <= 7

    asyncio.run(run())


def test_results_that_were_fetched_go_before_others() -> None:
    async def run() -> None:
        table = Table(max_bytes=450_000)
        first, second, third = (table.result("a") for _ in range(3))
        await table.futures.wait(second, "a", 0.0)
        table.result("a")
        table.result("a")
        assert await table.kept("a", first, second, third) == [True, False, True]

    asyncio.run(run())


def test_the_newest_result_can_always_be_fetched() -> None:
    async def run() -> None:
        table = Table(max_bytes=1)
        old = table.result("a")
        new = table.result("b")
        assert await table.kept("a", old) == [False]
        assert await table.futures.wait(new, "b", 0.0) == RESULT

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
