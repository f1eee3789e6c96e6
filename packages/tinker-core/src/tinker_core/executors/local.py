"""The ``local`` executor: ranks in spawned processes of this machine, commands over ``ipc://`` sockets."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from tinker_core import errors
from tinker_core.encoding import Encoder, Nothing
from tinker_core.errors import TinkerError, WorkerLostError
from tinker_core.executors.protocol import METHODS
from tinker_core.executors.rank import CALL, ENDED, ERROR, FAILED, READY, RESULT, STOP, WRITER, Start
from tinker_core.interfaces import ExecutorPlugin, WorkerGroupSpec
from tinker_core.types import PreparedModelPassBatch, RequestError

log = logging.getLogger(__name__)

_STOP_SECONDS = 20.0
_LARGE_PASS = 64
"""Data of a pass that are encoded off the event loop: thousands of them would stop it for a second."""
_LARGE_ANSWER = 64 * 1024
"""Bytes of an answer that is decoded off the event loop."""


def _is_large(payload: object) -> bool:
    if not isinstance(payload, PreparedModelPassBatch):
        return False
    return sum(len(request.data) for request in payload.requests) > _LARGE_PASS


class RemoteError(TinkerError):
    """An unexpected exception in a worker process; the message names its type."""


class RemoteUserError(errors.UserError):
    """A user error of a class that this process does not know."""


def raise_error(error: RequestError) -> TinkerError:
    """The exception that stands for an error from another process; its class if it is one of ours."""
    known = getattr(errors, error.code, None)
    if isinstance(known, type) and issubclass(known, TinkerError):
        rebuilt = known.__new__(known)
        Exception.__init__(rebuilt, error.message)
        return rebuilt
    return RemoteUserError(error.message) if error.category == "user" else RemoteError(error.message)


class LocalGroup:
    """Worker processes of one base model on this machine."""

    def __init__(self, spec: WorkerGroupSpec) -> None:
        self._spec = spec
        self._directory = Path(tempfile.mkdtemp(prefix="tinker-"))
        self._encoder = Encoder()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._processes: list[asyncio.subprocess.Process] = []
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        """Encoded answers to come."""
        self._ids = itertools.count()
        self._ready: set[int] = set()
        self._all_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ended: set[bytes] = set()
        self._all_answered = asyncio.Event()
        """Rank 0 and its writing thread have nothing more to say."""
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> None:
        """Spawn the ranks and wait until all are ready; raises their own error if one is not."""
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        address = f"ipc://{self._directory}/engine"
        self._socket.bind(address)
        start = Start(
            spec=self._spec,
            rendezvous=f"file://{self._directory}/rendezvous",
            follower_addresses=tuple(f"ipc://{self._directory}/rank{r}" for r in range(1, self._spec.num_ranks)),
        )
        for rank in range(self._spec.num_ranks):
            self._processes.append(await self._spawn(address, rank))
        self._tasks = [asyncio.create_task(self._watch(rank)) for rank in range(self._spec.num_ranks)]
        self._tasks.append(asyncio.create_task(self._receive(self._encoder.encode(start, Start))))
        await asyncio.shield(self._all_ready)  # a cancelled start must not cancel what `close` looks at

    async def _spawn(self, address: str, rank: int) -> asyncio.subprocess.Process:
        environment = {**os.environ, "LOCAL_RANK": str(rank), **self._spec.environment}
        return await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "tinker_core.executors.rank", address, str(rank), stdin=asyncio.subprocess.PIPE,
            env=environment,
        )  # fmt: skip

    async def _watch(self, rank: int) -> None:
        code = await self._processes[rank].wait()
        if not self._closing:
            self._lose(f"rank {rank} of base model {self._spec.base_model.name!r} ended with exit code {code}")

    def _lose(self, reason: str) -> None:
        """A world that misses one rank is lost as a whole."""
        if not self._lost.done():
            log.error("worker group lost: %s", reason)
            self._lost.set_result(reason)
        if not self._all_ready.done():
            self._all_ready.set_exception(WorkerLostError(f"{reason} while it was starting; see its log above"))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(WorkerLostError(f"{reason}; its models are gone"))
        self._calls.clear()
        for process in self._processes:
            if process.returncode is None:
                process.kill()

    async def _receive(self, start: bytes) -> None:
        while True:
            sender, *message = await self._socket.recv_multipart()
            if message[0] in (RESULT, ERROR):  # of rank 0, or of its writing thread
                self._answer(message)
                continue
            if message[0] == ENDED:
                self._ended.add(sender)
                if self._ended >= {b"0", WRITER}:
                    self._all_answered.set()
                continue
            rank = int(sender)
            if message[0] == b"hello":
                await self._socket.send_multipart([sender, start])
            elif message[0] == READY:
                self._ready.add(rank)
                if len(self._ready) == self._spec.num_ranks and not self._all_ready.done():
                    self._all_ready.set_result(None)
            elif message[0] == FAILED:
                self._fail(self._encoder.decode(message[1], RequestError), rank)

    def _fail(self, error: RequestError, rank: int) -> None:
        if not self._all_ready.done():
            self._all_ready.set_exception(raise_error(error))
        self._lose(f"rank {rank} of base model {self._spec.base_model.name!r} failed: {error.message}")

    def _answer(self, message: list[bytes]) -> None:
        kind, call_id, payload = message
        future = self._calls.pop(int(call_id), None)
        if future is None or future.done():
            return  # the caller has gone away
        if kind == RESULT:
            future.set_result(payload)
        else:
            future.set_exception(raise_error(self._encoder.decode(payload, RequestError)))

    async def call(self, method: str, payload: object = None) -> Any:  # noqa: ANN401 - typed per method
        """Run one command in every rank and return rank 0's answer."""
        if self._lost.done():
            raise WorkerLostError(f"{self._lost.result()}; its models are gone")
        encode = partial(self._encoder.encode, Nothing() if payload is None else payload, METHODS[method][0])
        body = await asyncio.to_thread(encode) if _is_large(payload) else encode()
        if self._lost.done():  # while it was encoded
            raise WorkerLostError(f"{self._lost.result()}; its models are gone")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        call_id = next(self._ids)
        self._calls[call_id] = future
        try:
            await self._socket.send_multipart([b"0", CALL, str(call_id).encode(), method.encode(), body])
            answer = await future
        finally:
            self._calls.pop(call_id, None)  # also of a caller that has gone away
        decode = partial(self._encoder.decode, answer, METHODS[method][1])
        return await asyncio.to_thread(decode) if len(answer) > _LARGE_ANSWER else decode()

    @property
    def is_lost(self) -> bool:
        """Whether a process has died unasked."""
        return self._lost.done()

    async def wait_lost(self) -> str:
        """The reason, as soon as a process has died unasked."""
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        """Ask the ranks to stop, kill those that do not, and remove the private directory."""
        if self._closing:
            return
        self._closing = True
        alive = [process for process in self._processes if process.returncode is None]
        if alive and self._all_ready.done() and not self._all_ready.exception() and not self._lost.done():
            await self._socket.send_multipart([b"0", STOP])
            waits = [asyncio.create_task(process.wait()) for process in alive]
            await asyncio.wait(waits, timeout=_STOP_SECONDS)
            if self._processes[0].returncode == 0:  # then its last answers are on their way, if not here
                await asyncio.wait([asyncio.create_task(self._all_answered.wait())], timeout=_STOP_SECONDS)
        for process in alive:
            if process.returncode is None:
                process.kill()
                await process.wait()
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(WorkerLostError("the server is stopping"))
        self._calls.clear()
        self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._directory)


async def start_local(spec: WorkerGroupSpec) -> LocalGroup:
    """Start a worker group on this machine."""
    group = LocalGroup(spec)
    await group.start()
    return group


LOCAL_EXECUTOR = ExecutorPlugin(name="local", start=start_local)
