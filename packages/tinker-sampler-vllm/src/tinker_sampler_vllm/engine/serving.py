"""Commands from a socket to an engine, each answered as soon as it is done."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from tinker_core.encoding import Encoder, Nothing
from tinker_core.errors import (
    CapacityError,
    ConfigurationError,
    TinkerError,
    UnsupportedFeatureError,
    WorkerLostError,
)
from tinker_core.executors.protocol import CancelCall, RetireCall, WaitingCall
from tinker_core.executors.rank_loop import describe_error
from tinker_core.types import PreparedSample, RequestError, SampleOutput, SamplerCapabilities
from tinker_sampler_vllm.protocol import (
    CALL,
    ERROR,
    METHODS,
    PROTOCOL_VERSION,
    RESULT,
    STOP,
    ClaimCall,
    EngineDescription,
    EngineSettings,
    LoadCall,
)

log = logging.getLogger(__name__)

CLAIM_SECONDS = 30.0
"""An engine of whose sampler nothing was heard for so long may be claimed by another server."""
_MEMORY = Path("/dev/shm")


class Engine(Protocol):
    """What is served; `VllmEngine` is the real one."""

    @property
    def capabilities(self) -> SamplerCapabilities:
        """What it offers."""

    async def load(self, revision: str, directory: str) -> None:
        """Take an adapter."""

    async def load_full(self, revision: str, directory: str) -> None:
        """Take all weights of a model."""

    async def retire(self, revision: str) -> None:
        """Forget weights."""

    async def retire_all(self) -> None:
        """Forget all weights, and end all samples."""

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        """Generate."""

    def is_waiting(self, sample_id: str) -> bool:
        """Whether a sample has produced nothing yet."""

    async def check(self) -> None:
        """Raise when it has died."""

    async def wait_dead(self) -> None:
        """Return when it has died."""


class EngineServer:
    """Answers the commands of one sampler at a time."""

    def __init__(self, engine: Engine, settings: EngineSettings, vllm_version: str, socket: Any) -> None:  # noqa: ANN401
        self._engine = engine
        self._socket = socket
        self._encoder = Encoder()
        self._description = EngineDescription(
            capabilities=engine.capabilities,
            base_model=settings.base_model.name,
            dtype=settings.dtype,
            vllm_version=vllm_version,
            incarnation=uuid.uuid4().hex,
        )
        self._owner: ClaimCall | None = None
        self._owner_address = b""
        self._heard_at = 0.0
        self._samples: dict[str, asyncio.Task[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._methods: dict[str, Callable[[Any], Awaitable[object]]] = {
            "load": self._load,
            "retire": self._retire,
            "sample": self._sample,
            "cancel": self._cancel,
            "is_waiting": self._is_waiting,
            "health": self._health,
        }

    async def run(self) -> None:
        """Serve until told to stop; raises `WorkerLostError` when the engine dies."""
        dead = asyncio.create_task(self._engine.wait_dead())
        receiving = asyncio.create_task(self._receive())
        try:
            await asyncio.wait([dead, receiving], return_when=asyncio.FIRST_COMPLETED)
            if dead.done() and not receiving.done():
                raise WorkerLostError("vLLM has died; its own messages are above")
            receiving.result()
        finally:
            for task in (dead, receiving, *self._tasks):
                task.cancel()
            await asyncio.gather(dead, receiving, *self._tasks, return_exceptions=True)

    async def _receive(self) -> None:
        while True:
            sender, kind, *rest = await self._socket.recv_multipart()
            if kind == STOP:
                if sender == self._owner_address:
                    return
                continue
            if kind == CALL and len(rest) == 3:
                task = asyncio.create_task(self._answer(sender, *rest))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _answer(self, sender: bytes, call_id: bytes, method: bytes, body: bytes) -> None:
        try:
            name = method.decode()
            if name not in METHODS:
                raise UnsupportedFeatureError(f"this engine has no command {name!r}; are both sides of one version?")
            payload = self._encoder.decode(body, METHODS[name][0])
            answer = await self._run(sender, name, payload)
            reply = [sender, RESULT, call_id, self._encoder.encode(answer, METHODS[name][1])]
        except WorkerLostError:
            return  # `run` ends, and with it the connection
        except Exception as error:
            if not isinstance(error, TinkerError):
                log.exception("command %s failed", method.decode(errors="replace"))
            reply = [sender, ERROR, call_id, self._encoder.encode(describe_error(error), RequestError)]
        await self._socket.send_multipart(reply)

    async def _run(self, sender: bytes, name: str, payload: Any) -> object:  # noqa: ANN401 - typed per method
        now = asyncio.get_running_loop().time()
        if name == "claim":
            return await self._claim(sender, payload, now)
        if self._owner is None or sender != self._owner_address:
            raise CapacityError("this engine works for another server now")
        self._heard_at = now
        return await self._methods[name](payload)

    async def _claim(self, sender: bytes, claim: ClaimCall, now: float) -> EngineDescription:
        if claim.version != PROTOCOL_VERSION:
            raise ConfigurationError(
                f"the sampler speaks version {claim.version} and the engine {PROTOCOL_VERSION}: "
                "install one release on both machines"
            )
        owner = self._owner
        if owner is not None and owner.server != claim.server and now - self._heard_at < CLAIM_SECONDS:
            raise CapacityError("this engine works for another server; give each server engines of its own")
        self._owner, self._owner_address, self._heard_at = claim, sender, now
        if owner is not None and owner.client != claim.client:
            samples = list(self._samples.values())
            for task in samples:
                task.cancel()
            await asyncio.gather(*samples, return_exceptions=True)
            await self._engine.retire_all()
        return self._description

    async def _load(self, call: LoadCall) -> Nothing:
        load = self._engine.load_full if call.full else self._engine.load
        if call.directory is not None:
            await load(call.revision, call.directory)
            return Nothing()
        directory = await asyncio.to_thread(_write, call.files)
        try:
            await load(call.revision, str(directory))
        finally:
            await asyncio.to_thread(shutil.rmtree, directory)
        return Nothing()

    async def _retire(self, call: RetireCall) -> Nothing:
        await self._engine.retire(call.revision)
        return Nothing()

    async def _sample(self, sample: PreparedSample) -> SampleOutput:
        task = asyncio.ensure_future(self._engine.sample(sample))
        self._samples[sample.request_id] = task
        try:
            return await task
        except asyncio.CancelledError:
            raise WorkerLostError("the sample was cancelled") from None  # whoever cancelled it waits for no answer
        finally:
            self._samples.pop(sample.request_id, None)

    async def _cancel(self, call: CancelCall) -> Nothing:
        task = self._samples.get(call.request_id)
        if task is not None:
            task.cancel()
        return Nothing()

    async def _is_waiting(self, call: WaitingCall) -> bool:
        return self._engine.is_waiting(call.request_id)

    async def _health(self, call: Nothing) -> Nothing:
        await self._engine.check()
        return call


def _write(files: dict[str, bytes]) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="tinker-incoming-", dir=_MEMORY if _MEMORY.is_dir() else None))
    for name, content in files.items():
        (directory / Path(name).name).write_bytes(content)
    return directory
