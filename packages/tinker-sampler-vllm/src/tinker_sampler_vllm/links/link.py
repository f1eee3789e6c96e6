"""The sampler's end of a connection to an engine."""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from functools import partial
from typing import Any, Protocol

import attrs
import zmq
import zmq.asyncio

from tinker_core.encoding import Encoder, Nothing
from tinker_core.errors import InvalidRequestError, TinkerError, WorkerLostError
from tinker_core.executors.local import raise_error
from tinker_core.executors.protocol import CancelCall, RetireCall, WaitingCall
from tinker_core.types import PreparedSample, RequestError, SampleOutput
from tinker_sampler_vllm.protocol import (
    CALL,
    MAX_CALL_BYTES,
    METHODS,
    RESULT,
    ClaimCall,
    EngineDescription,
    LoadCall,
)
from tinker_sampler_vllm.security import secure_client

log = logging.getLogger(__name__)

HEALTH_SECONDS = 5.0
"""How often an engine is asked whether it is well."""
SILENCE_SECONDS = 20.0
"""An engine that has not answered for so long is given up."""
_LARGE_ANSWER = 64 * 1024
"""Bytes of an answer that is decoded off the event loop."""


@attrs.frozen(kw_only=True)
class HealthChecks:
    """How a sampler finds out that an engine is gone without a word."""

    interval: float = HEALTH_SECONDS
    """Seconds between two questions whether it is well."""
    silence: float = SILENCE_SECONDS
    """Seconds without any answer after which it is given up."""


class EngineLink(Protocol):
    """One running engine. A lost one never comes back: another takes its place."""

    @property
    def description(self) -> EngineDescription:
        """What the engine says of itself."""

    @property
    def is_lost(self) -> bool:
        """Whether it cannot be used any more."""

    async def wait_lost(self) -> str:
        """The reason, as soon as it is lost."""

    async def load(self, call: LoadCall) -> None:
        """Have it hold weights."""

    async def retire(self, revision: str) -> None:
        """Have it forget weights."""

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        """Generate; raises `WorkerLostError` when the engine is lost."""

    async def is_waiting(self, request_id: str) -> bool:
        """Whether a sample has not begun."""

    async def close(self) -> None:
        """Let go of it."""


class SocketLink:
    """Calls to an engine process over a ZeroMQ socket."""

    def __init__(self, name: str, checks: HealthChecks | None = None) -> None:
        self.name = name
        self._checks = checks or HealthChecks()
        self._encoder = Encoder()
        self._context = zmq.asyncio.Context()
        self._socket: Any = self._context.socket(zmq.DEALER)
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._ids = itertools.count()
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._cancels: set[asyncio.Task[None]] = set()
        self._description: EngineDescription | None = None
        self._heard_at = 0.0

    async def connect(self, address: str, secret: str | None, claim: ClaimCall) -> None:
        """Connect and take the engine over; raises its own refusal, or `WorkerLostError` when nobody answers."""
        secure_client(self._socket, secret)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, "[" in address)
        # A full queue would have callers wait in the socket, where the loss of the engine does not reach them.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self._tasks.append(asyncio.create_task(self._receive()))
        try:
            async with asyncio.timeout(self._checks.silence):
                self._description = await self.call("claim", claim)
        except TimeoutError as error:
            raise WorkerLostError(
                f"{self.name} does not answer at {address}; is it running, and do both sides have one secret?"
            ) from error
        self._heard_at = asyncio.get_running_loop().time()
        self._tasks.append(asyncio.create_task(self._watch_health()))

    @property
    def description(self) -> EngineDescription:
        """What the engine says of itself."""
        assert self._description is not None
        return self._description

    # --- calls --------------------------------------------------------------------------------------------------------

    async def call(self, method: str, payload: object) -> Any:  # noqa: ANN401 - typed per method
        """Run one command."""
        self._require()
        body = self._encoder.encode(payload, METHODS[method][0])
        if len(body) > MAX_CALL_BYTES:
            raise InvalidRequestError(f"a {method} of {len(body)} bytes is too large; engines take {MAX_CALL_BYTES}")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        call_id = next(self._ids)
        self._calls[call_id] = future
        try:
            await self._socket.send_multipart([CALL, str(call_id).encode(), method.encode(), body])
            answer = await future
        finally:
            self._calls.pop(call_id, None)  # also of a caller that has gone away
        decode = partial(self._encoder.decode, answer, METHODS[method][1])
        return await asyncio.to_thread(decode) if len(answer) > _LARGE_ANSWER else decode()

    async def load(self, call: LoadCall) -> None:
        """Have it hold weights."""
        await self.call("load", call)

    async def retire(self, revision: str) -> None:
        """Have it forget weights."""
        await self.call("retire", RetireCall(revision=revision))

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        """Generate; a cancelled caller frees the sample's place."""
        try:
            output: SampleOutput = await self.call("sample", sample)
        except asyncio.CancelledError:
            task = asyncio.create_task(self._cancel(sample.request_id))
            self._cancels.add(task)
            task.add_done_callback(self._cancels.discard)
            raise
        return output

    async def _cancel(self, request_id: str) -> None:
        try:
            await self.call("cancel", CancelCall(request_id=request_id))
        except TinkerError as error:
            log.debug("%s: the place of %s went with its engine: %s", self.name, request_id, error)

    async def is_waiting(self, request_id: str) -> bool:
        """Whether a sample has not begun."""
        waiting: bool = await self.call("is_waiting", WaitingCall(request_id=request_id))
        return waiting

    async def _receive(self) -> None:
        while True:
            kind, call_id, body = await self._socket.recv_multipart()
            self._heard_at = asyncio.get_running_loop().time()
            future = self._calls.pop(int(call_id), None)
            if future is None or future.done():
                continue  # the caller has gone away
            if kind == RESULT:
                future.set_result(body)
            else:
                future.set_exception(raise_error(self._encoder.decode(body, RequestError)))

    # --- life ---------------------------------------------------------------------------------------------------------

    async def _watch_health(self) -> None:
        """Ask again and again: a machine that is gone says nothing."""
        while True:
            await asyncio.sleep(self._checks.interval)
            try:
                async with asyncio.timeout(self._checks.silence):
                    await self.call("health", Nothing())
            except TimeoutError:
                if asyncio.get_running_loop().time() - self._heard_at >= self._checks.silence:
                    self.lose(f"{self.name} has not answered for {self._checks.silence:.0f} seconds")
                    return
            except WorkerLostError:
                return
            except Exception as error:  # the engine itself says that it is not ours, or not well
                self.lose(f"{self.name}: {error}")
                return

    def _require(self) -> None:
        if self._lost.done():
            raise WorkerLostError(self._lost.result())

    @property
    def is_lost(self) -> bool:
        """Whether it cannot be used any more."""
        return self._lost.done()

    async def wait_lost(self) -> str:
        """The reason, as soon as it is lost."""
        return await asyncio.shield(self._lost)

    def lose(self, reason: str) -> None:
        """Fail all calls in progress and all to come."""
        if not self._lost.done():
            self._lost.set_result(reason)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(WorkerLostError(reason))

    async def close(self) -> None:
        """Let go of the connection."""
        self.lose(f"{self.name} is not used any more")
        tasks = [*self._tasks, *self._cancels]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()
