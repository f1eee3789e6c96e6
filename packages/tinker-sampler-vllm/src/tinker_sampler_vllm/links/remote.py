"""An engine on another machine, which ``tinker-sampler-vllm serve`` keeps running there."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Self

import attrs
import zmq
from zmq.utils.monitor import recv_monitor_message

from tinker_core.encoding import Nothing
from tinker_core.errors import TinkerError, UnknownCheckpointError
from tinker_sampler_vllm.links.link import HealthChecks, SocketLink
from tinker_sampler_vllm.protocol import CHUNK_BYTES, ClaimCall, LoadCall, PutCall

log = logging.getLogger(__name__)

_RELEASE_SECONDS = 5.0
_REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class RemoteLink(SocketLink):
    """A connection to an engine that outlives it."""

    @classmethod
    async def start(
        cls, name: str, address: str, secret: str, claim: ClaimCall, checks: HealthChecks | None = None
    ) -> Self:
        """Connect and take the engine over; raises why that cannot be."""
        link = cls(name, checks)
        try:
            link._tasks.append(asyncio.create_task(link._watch_connection()))
            await link.connect(address, secret, claim)
        except BaseException:
            await link.close()
            raise
        return link

    async def _watch_connection(self) -> None:
        """A connection that ends is not made again: nobody knows what was lost with it."""
        events = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _REFUSALS)
        try:
            while True:
                event: Any = await recv_monitor_message(events)
                if event["event"] & _REFUSALS:
                    self.lose(f"{self.name} does not let this server in; do both sides have one secret?")
                else:
                    self.lose(f"the connection to {self.name} has ended")
        finally:
            self._socket.disable_monitor()
            events.close()

    async def load(self, call: LoadCall) -> None:
        """Bring it the files of weights, and have it hold them."""
        if call.directory is None:
            await super().load(call)
            return
        try:
            for path in await asyncio.to_thread(_files, Path(call.directory)):
                await self._put(call.revision, path)
        except FileNotFoundError as error:  # they were retired meanwhile
            raise UnknownCheckpointError(call.revision) from error
        await super().load(attrs.evolve(call, directory=None))

    async def _put(self, revision: str, path: Path) -> None:
        with await asyncio.to_thread(path.open, "rb") as file:
            offset = 0
            while (data := await asyncio.to_thread(file.read, CHUNK_BYTES)) or not offset:
                await self.call("put", PutCall(revision=revision, name=path.name, offset=offset, data=data))
                offset += len(data)
                if not data:
                    return

    async def close(self) -> None:
        """Let go of the engine, which runs on for whoever claims it next."""
        if not self.is_lost and self._description is not None:
            try:
                async with asyncio.timeout(_RELEASE_SECONDS):
                    await self.call("release", Nothing())
            except (TinkerError, TimeoutError) as error:
                log.warning("%s was not released, and others have to wait for it: %s", self.name, error)
        await super().close()


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())
