"""``tinker-sampler-vllm serve``: keeps one engine running at an address, for servers on other machines."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol

import attrs

from tinker_sampler_vllm.protocol import EngineSettings
from tinker_sampler_vllm.restarts import Restarts

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunningEngine(Protocol):
    """An engine process; `tinker_sampler_vllm.links.local.EngineProcess` is the real one."""

    async def wait(self) -> int:
        """Its exit status, when it has ended."""

    async def stop(self) -> None:
        """End it in order."""

    async def kill(self) -> None:
        """End it at once, with whatever it has left behind."""


StartEngine = Callable[[], Awaitable[RunningEngine]]


@attrs.frozen(kw_only=True)
class ServedEngine:
    """What is served where."""

    settings: EngineSettings
    address: str
    secret: str = attrs.field(repr=False)


async def serve_until_signal(served: ServedEngine) -> None:
    """Keep an engine running; returns after SIGTERM or SIGINT, and raises why the first one does not start."""
    from tinker_sampler_vllm.links.local import EngineProcess

    async def start() -> RunningEngine:
        return await EngineProcess.start(served.settings, served.address, served.secret)

    settings = served.settings
    ready = f"ready: {settings.base_model.name!r} in {settings.dtype} on {settings.device} at {served.address}"
    keeping = asyncio.create_task(keep_running(start, ready, Restarts()))
    loop = asyncio.get_running_loop()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if not stopped:  # a second signal must not interrupt what the first one began
            stopped = True
            keeping.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        await keeping
    except asyncio.CancelledError:
        if not stopped:
            raise
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def keep_running(start: StartEngine, ready: str, restarts: Restarts) -> None:
    """Start engine after engine; says ``ready`` on standard output each time that one is.

    Raises the error of the first start. When it is cancelled, the engine has ended in order before it returns.
    """
    engine = await start()
    loop = asyncio.get_running_loop()
    while True:
        sys.stdout.write(ready + "\n")
        sys.stdout.flush()
        since = loop.time()
        try:
            status = await engine.wait()
        except asyncio.CancelledError:
            await engine.stop()
            raise
        log.error("the engine ended with exit status %d; it is started again", status)
        await engine.kill()
        engine = await restarts.start_again("the engine", start, lived=loop.time() - since)
