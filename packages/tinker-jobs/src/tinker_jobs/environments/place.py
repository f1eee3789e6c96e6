"""One environment while a policy works in it."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tinker_core.rewards import CommandResult, EnvironmentPlugin, Observation, TaskEnvironment
from tinker_jobs.environments.checking import Verification

_T = TypeVar("_T")


class PlaceError(Exception):
    """A provider failed, with what it raised."""


class Place:
    """A provider's environment, which blocks, in a thread of its own. Use it with ``async with``; whatever the provider
    raises is a `PlaceError`."""

    def __init__(
        self,
        provider: EnvironmentPlugin,
        task: Mapping[str, object],
        inputs: Mapping[str, object],
        timeout_s: float,
    ) -> None:
        self._provider = provider
        self._task = task
        self._inputs = inputs
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="environment")
        self._environment: TaskEnvironment | None = None

    async def __aenter__(self) -> Place:
        try:
            await self._run(self._open)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def act(self, message: str) -> Observation:
        """Let the policy's message take effect."""
        return await self._run(lambda: self._opened.act(message))

    async def verify(self, verification: Verification) -> bool:
        """Whether the task is done; it is not where finding out takes too long."""
        return await self._run(lambda: self._verify(verification))

    def _verify(self, verification: Verification) -> bool:
        try:
            result = self._opened.run(verification.command, verification.timeout_s)
        except TimeoutError:
            return False
        return judge(result, verification)

    @property
    def _opened(self) -> TaskEnvironment:
        assert self._environment is not None
        return self._environment

    def _open(self) -> None:
        self._environment = self._provider.open(self._task, self._inputs, self._timeout_s)

    async def _run(self, work: Callable[[], _T]) -> _T:
        def guarded() -> _T:
            try:
                return work()
            except Exception as error:  # a provider raises what it likes; its author needs the lines
                traceback.print_exc()
                raise PlaceError(f"{self._provider.name}: {type(error).__name__}: {error}") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)

    async def _close(self) -> None:
        # In the same thread, so after whatever it still does: an environment that opens too late is closed too.
        closing = asyncio.ensure_future(self._run(self._end))
        try:
            await asyncio.shield(closing)
        finally:
            self._thread.shutdown(wait=False)

    def _end(self) -> None:
        if self._environment is not None:
            self._environment.close()


def judge(result: CommandResult, verification: Verification) -> bool:
    """Whether a command ended as it should."""
    if result.exit_code != verification.expected_exit_code:
        return False
    text = result.output.strip()
    if verification.expected_hash is not None:
        return hashlib.sha256(text.encode()).hexdigest() == verification.expected_hash
    return verification.expected_text is None or text == verification.expected_text
