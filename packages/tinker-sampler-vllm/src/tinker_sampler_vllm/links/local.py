"""An engine in a process of this machine, started and stopped by the sampler."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import shutil
import sys
import uuid
from pathlib import Path

from tinker_core.encoding import Encoder
from tinker_core.errors import WorkerLostError
from tinker_core.executors.local import raise_error
from tinker_core.types import RequestError
from tinker_sampler_vllm.engine.environment import engine_environment
from tinker_sampler_vllm.engine.incoming import incoming_directory
from tinker_sampler_vllm.links.link import HealthChecks, SocketLink
from tinker_sampler_vllm.process_group import end_group
from tinker_sampler_vllm.protocol import READY, ClaimCall, EngineSettings

log = logging.getLogger(__name__)

_STOP_SECONDS = 20.0
_CHECKS = HealthChecks(silence=120.0)
"""Patient: the end of a child is noticed at once, and a silent one may only have been given no time to run."""
READY_FD_VARIABLE = "TINKER_READY_FD"
_STANDARD_ERROR = 2
"""Where vLLM's log goes, which it would write to standard output."""


class EngineProcess:
    """A child process that runs one engine, and leads a process group of its own.

    So a Ctrl-C at the terminal reaches only its parent, which stops it in order.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(
        cls, settings: EngineSettings, address: str, secret: str | None = None, visible_devices: str | None = None
    ) -> EngineProcess:
        """Start it and wait until it is ready; raises its own error."""
        reading, writing = os.pipe()
        environment = engine_environment(settings.device, os.environ) | {READY_FD_VARIABLE: str(writing)}
        if visible_devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible_devices
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "tinker_sampler_vllm.engine", address,
                stdin=asyncio.subprocess.PIPE, stdout=_STANDARD_ERROR, env=environment, pass_fds=(writing,),
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        started = cls(process)
        try:
            assert process.stdin is not None
            encoded = base64.b64encode(Encoder().encode(settings, EngineSettings))
            process.stdin.write(encoded + b"\n" + (secret or "").encode() + b"\n")
            await started._wait_ready(reading, settings.base_model.name)
        except BaseException:
            await started.kill()
            raise
        return started

    async def _wait_ready(self, reading: int, base_model: str) -> None:
        loop = asyncio.get_running_loop()
        stream = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb", buffering=0)
        )
        try:
            line = await stream.readline()  # also ends when the process does
        finally:
            transport.close()
        kind, _, detail = line.strip().partition(b" ")
        if kind == READY:
            return
        if kind:
            raise raise_error(Encoder().decode(base64.b64decode(detail), RequestError))
        code = await self.process.wait()
        raise WorkerLostError(f"the engine of {base_model!r} ended with exit code {code} while it started; see above")

    async def wait(self) -> int:
        """Its exit status, when it has ended; minus the signal that killed it."""
        return await self.process.wait()

    async def stop(self) -> None:
        """Have it end in order, or kill it if it does not."""
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            log.warning("an engine did not stop within %.0f seconds and is killed", _STOP_SECONDS)
        await self.kill()

    async def kill(self) -> None:
        """End it now, if it has not ended, and whatever it has left behind."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await asyncio.to_thread(end_group, self.process.pid)
        await asyncio.to_thread(shutil.rmtree, incoming_directory(self.process.pid), ignore_errors=True)
        if self.process.stdin is not None:
            self.process.stdin.close()


class LocalLink(SocketLink):
    """A connection to an engine process that belongs to it."""

    _process: EngineProcess
    _watching: asyncio.Task[None]

    @classmethod
    async def start(
        cls, name: str, settings: EngineSettings, directory: Path, claim: ClaimCall, visible_devices: str | None = None
    ) -> LocalLink:
        """Start an engine in this directory and connect; raises why it does not start."""
        socket = directory / f"{uuid.uuid4().hex[:12]}.sock"
        address = f"ipc://{socket}"
        process = await EngineProcess.start(settings, address, visible_devices=visible_devices)
        link = cls(name, _CHECKS)
        link._process = process
        link._watching = asyncio.create_task(link._watch())
        try:
            await link.connect(address, None, claim)
        except BaseException:
            await link.close()
            raise
        return link

    async def _watch(self) -> None:
        code = await self._process.wait()
        self.lose(f"{self.name} ended with exit code {code}")

    async def close(self) -> None:
        """Stop the engine."""
        if self.is_lost or self._description is None:
            await self._process.kill()
        else:
            self._watching.cancel()
            await self._process.stop()
        await asyncio.gather(self._watching, return_exceptions=True)
        await super().close()
