"""How bodies arrive: their pace, their size, and the room that all of them share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from tinker_server.limits import Limits
from tinker_server.receiving import BodyMemory, ServerBusyError, SlowBodyError, receive
from tinker_server.wire.body import BodyTooLargeError

LIMITS = Limits(body_limit=1000, control_body_limit=100, body_timeout=0.2, body_min_rate=10_000)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 120))


def request(parts: AsyncIterator[bytes], *headers: tuple[bytes, bytes]) -> Request:
    async def receive_message() -> dict[str, Any]:
        try:
            return {"type": "http.request", "body": await anext(parts), "more_body": True}
        except StopAsyncIteration:
            return {"type": "http.request", "body": b"", "more_body": False}

    return Request({"type": "http", "method": "POST", "path": "/", "headers": list(headers)}, receive_message)


async def parts_of(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def stalling(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    await asyncio.Event().wait()


async def take(source: Request, *, limit: int = 1000, limits: Limits = LIMITS) -> bytes:
    with BodyMemory(limits.body_memory).lease() as lease:
        return await receive(source, limit, limits, lease)


@pytest.mark.parametrize("parts", [(), (b"abc",), (b"a", b"b", b"", b"c"), tuple(b"x" for _ in range(900))])
def test_a_body_is_the_sum_of_its_parts(parts: tuple[bytes, ...]) -> None:
    assert run(take(request(parts_of(*parts)))) == b"".join(parts)


@pytest.mark.parametrize("declared", [b"1001", b"9" * 5000])
def test_a_length_beyond_the_limit_is_refused_unread(declared: bytes) -> None:
    with pytest.raises(BodyTooLargeError, match="--body-limit"):
        run(take(request(stalling(), (b"content-length", declared))))


@pytest.mark.parametrize("declared", [b"", b"-5", b"abc", b"\xb2", b"1e9", b"3"])
def test_a_strange_length_is_not_believed(declared: bytes) -> None:
    assert run(take(request(parts_of(b"abc"), (b"content-length", declared)))) == b"abc"


def test_a_body_that_grows_beyond_the_limit() -> None:
    with pytest.raises(BodyTooLargeError, match="--control-body-limit"):
        run(take(request(stalling(bytes(60), bytes(60))), limit=100))


@pytest.mark.parametrize("parts", [(), (b"{",), (bytes(500),)])
def test_a_body_that_stalls_is_given_up(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(SlowBodyError, match="did not arrive in time"):
        run(take(request(stalling(*parts))))


def test_a_client_that_goes_away() -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        run(take(Request({"type": "http", "method": "POST", "path": "/", "headers": []}, gone)))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_room_comes_back() -> None:
    async def work() -> None:
        memory = BodyMemory(100)
        early = ExitStack()
        first = early.enter_context(memory.lease())
        with memory.lease() as second, memory.lease() as third:
            await first.grow(60, 1.0)
            waiting = asyncio.create_task(second.grow(60, 20.0))
            await asyncio.sleep(0)
            assert not waiting.done()
            await third.grow(10, 1.0)  # what fits need not wait behind what does not
            early.close()
            await waiting
            assert memory.held == 70
        assert memory.held == 0

    run(work())


def test_bodies_that_wait_for_each_other_do_not_stand_still() -> None:
    """Ten bodies of 40 bytes each share 100: the oldest may always grow, and makes room when it is done."""

    async def body(memory: BodyMemory, log: list[int], number: int) -> None:
        with memory.lease() as lease:
            for _ in range(4):
                await lease.grow(10, 20.0)
                await asyncio.sleep(0)
            log.append(number)

    async def work() -> None:
        memory, log = BodyMemory(100), list[int]()
        await asyncio.gather(*(body(memory, log, number) for number in range(10)))
        assert sorted(log) == list(range(10))
        assert memory.held == 0

    run(work())


def test_a_body_larger_than_all_memory_passes_alone() -> None:
    async def work() -> None:
        memory = BodyMemory(10)
        with memory.lease() as lease:
            await lease.grow(1000, 1.0)

    run(work())


def test_too_many_bodies_are_told_to_come_back() -> None:
    async def work() -> None:
        memory = BodyMemory(10)
        with ExitStack() as stack:
            first, second = (stack.enter_context(memory.lease()) for _ in range(2))
            await first.grow(10, 1.0)
            with pytest.raises(ServerBusyError):
                await second.grow(10, 0.01)
        assert memory.held == 0

    run(work())
