"""Commands from a socket to an engine, each answered as soon as it is done."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
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
from tinker_sampler_vllm.engine.incoming import IncomingWeights
from tinker_sampler_vllm.protocol import (
    CALL,
    ERROR,
    METHODS,
    RESULT,
    ClaimCall,
    EngineDescription,
    EngineSettings,
    LoadCall,
    PutCall,
)

log = logging.getLogger(__name__)

CLAIM_SECONDS = 30.0
"""An engine of whose sampler nothing was heard for so long may be claimed by another server."""
DEATH_SECONDS = 5.0
"""How long after an error that nobody expected the engine may turn out to have died of it."""


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

    def __init__(
        self,
        engine: Engine,
        settings: EngineSettings,
        vllm_version: str,
        socket: Any,  # noqa: ANN401 - a zmq socket
        incoming: IncomingWeights,
        *,
        claim_seconds: float = CLAIM_SECONDS,
        death_seconds: float = DEATH_SECONDS,
    ) -> None:
        self._engine = engine
        self._socket = socket
        self._incoming = incoming
        self._claim_seconds = claim_seconds
        self._death_seconds = death_seconds
        self._encoder = Encoder()
        self._settings = settings
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
        self._handover = asyncio.Lock()
        self._samples: dict[str, asyncio.Task[SampleOutput]] = {}
        self._loads: set[asyncio.Future[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self._dead: asyncio.Task[None]
        self._methods: dict[str, Callable[[Any], Awaitable[object]]] = {
            "release": self._release,
            "put": self._put,
            "load": self._load,
            "retire": self._retire,
            "sample": self._sample,
            "cancel": self._cancel,
            "is_waiting": self._is_waiting,
            "health": self._health,
        }

    def stop(self) -> None:
        """Have `run` return."""
        self._stopped.set()

    async def run(self) -> None:
        """Serve until told to stop; raises `WorkerLostError` when the engine dies."""
        self._dead = asyncio.create_task(self._engine.wait_dead())
        receiving = asyncio.create_task(self._receive())
        stopped = asyncio.create_task(self._stopped.wait())
        own = (self._dead, receiving, stopped)
        try:
            await asyncio.wait(own, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                return
            if self._dead.done():
                raise WorkerLostError("vLLM has died; its own messages are above")
            receiving.result()
        finally:
            for task in (*own, *self._tasks):
                task.cancel()
            await asyncio.gather(*own, *self._tasks, return_exceptions=True)

    async def _receive(self) -> None:
        while True:
            sender, *message = await self._socket.recv_multipart()
            if len(message) == 4:
                task = asyncio.create_task(self._answer(sender, *message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            else:
                log.warning("a message of %d parts is no command of this protocol", len(message))

    async def _answer(self, sender: bytes, kind: bytes, call_id: bytes, method: bytes, body: bytes) -> None:
        try:
            answer = await self._run(sender, kind, method.decode(), body)
            reply = [sender, RESULT, call_id, answer]
        except WorkerLostError:
            return  # `run` ends, and with it the connection
        except TinkerError as error:
            reply = [sender, ERROR, call_id, self._encoder.encode(describe_error(error), RequestError)]
        except Exception as error:
            if await self._dies():
                return  # and then the error is no answer: another engine has one
            log.exception("command %s failed", method.decode(errors="replace"))
            reply = [sender, ERROR, call_id, self._encoder.encode(describe_error(error), RequestError)]
        await self._socket.send_multipart(reply)

    async def _dies(self) -> bool:
        """Whether the engine turns out to have died: what a worker leaves unfinished is noticed before its end is."""
        await asyncio.wait([self._dead], timeout=self._death_seconds)
        return self._dead.done()

    async def _run(self, sender: bytes, kind: bytes, name: str, body: bytes) -> bytes:
        if kind != CALL:
            raise ConfigurationError(
                f"the sampler speaks {kind.decode(errors='replace')!r} and the engine {CALL.decode()!r}: "
                "install one release of tinker-sampler-vllm on both machines"
            )
        if name not in METHODS:
            raise UnsupportedFeatureError(f"an engine has no command {name!r}")
        payload = self._encoder.decode(body, METHODS[name][0])
        if name == "claim":
            answer: object = await self._claim(sender, payload)
        elif self._owner is None or sender != self._owner_address:
            raise CapacityError("this engine works for another server now")
        else:
            self._heard_at = asyncio.get_running_loop().time()
            answer = await self._methods[name](payload)
        return self._encoder.encode(answer, METHODS[name][1])

    # --- whose engine it is -------------------------------------------------------------------------------------------

    async def _claim(self, sender: bytes, claim: ClaimCall) -> EngineDescription:
        self._require_match(claim)
        async with self._handover:
            now = asyncio.get_running_loop().time()
            owner = self._owner
            if owner is not None and owner.server != claim.server and now - self._heard_at < self._claim_seconds:
                raise CapacityError("this engine works for another server; give each server engines of its own")
            self._owner, self._owner_address, self._heard_at = claim, sender, now
            await self._forget_all()
        log.info("works for server %r now", claim.server)
        return self._description

    def _require_match(self, claim: ClaimCall) -> None:
        settings = self._settings
        served = settings.base_model.name, settings.dtype
        if served != (claim.base_model, claim.dtype):
            raise ConfigurationError(
                f"this engine serves {served[0]!r} in {served[1]}, not {claim.base_model!r} in {claim.dtype}"
            )
        if claim.deterministic and not settings.deterministic:
            raise ConfigurationError("this engine is not deterministic as the server is; start it with --deterministic")

    async def _release(self, call: Nothing) -> Nothing:
        async with self._handover:
            self._owner, self._owner_address = None, b""
            await self._forget_all()
        log.info("works for no server now")
        return call

    async def _forget_all(self) -> None:
        """End what the last owner has begun, and drop its weights."""
        running: list[asyncio.Future[Any]] = [*self._samples.values(), *self._loads]
        for sample in self._samples.values():
            sample.cancel()
        await asyncio.gather(*running, return_exceptions=True)  # weights of a load that is cut off would have no name
        await self._engine.retire_all()
        await asyncio.to_thread(self._incoming.clear)

    # --- commands -----------------------------------------------------------------------------------------------------

    async def _put(self, call: PutCall) -> Nothing:
        await asyncio.to_thread(self._incoming.put, call)
        return Nothing()

    async def _load(self, call: LoadCall) -> Nothing:
        load = self._engine.load_full if call.full else self._engine.load
        directory = call.directory or str(self._incoming.directory(call.revision))
        task = asyncio.ensure_future(load(call.revision, directory))
        self._loads.add(task)
        try:
            await asyncio.shield(task)
        finally:
            self._loads.discard(task)
            if call.directory is None:
                await asyncio.to_thread(self._incoming.forget, call.revision)
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
            if self._samples.get(sample.request_id) is task:
                del self._samples[sample.request_id]

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
