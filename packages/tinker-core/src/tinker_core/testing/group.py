"""A worker group for tests that are not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from tinker_core.executors.local import start_local
from tinker_core.interfaces import WorkerGroup, WorkerGroupSpec

_T = TypeVar("_T")


class BlockingGroup:
    """A worker group on an event loop of its own, behind blocking calls."""

    def __init__(self, group: WorkerGroup, loop: asyncio.AbstractEventLoop) -> None:
        self._group = group
        self._loop = loop

    def start(self, method: str, payload: object = None) -> Future[Any]:
        """Send a command; its answer is the future's result, its error the future's exception."""
        return asyncio.run_coroutine_threadsafe(self._group.call(method, payload), self._loop)

    def run(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run something else on the same event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, method: str, payload: object = None) -> Any:  # noqa: ANN401 - typed per method
        """Send a command and wait for its answer."""
        return self.start(method, payload).result(timeout=300)


@contextmanager
def start_group(spec: WorkerGroupSpec) -> Iterator[BlockingGroup]:
    """Run a worker group of real processes for the length of a block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait(future: Future[Any]) -> Any:  # noqa: ANN401 - whatever the coroutine returns
        return future.result(timeout=300)

    try:
        group = wait(asyncio.run_coroutine_threadsafe(start_local(spec), loop))
        try:
            yield BlockingGroup(group, loop)
        finally:
            wait(asyncio.run_coroutine_threadsafe(group.close(), loop))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=30)
        loop.close()
