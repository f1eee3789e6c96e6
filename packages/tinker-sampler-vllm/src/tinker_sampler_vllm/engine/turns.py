"""Whose turn it is on a device that holds one set of weights at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import attrs

from tinker_core.errors import CheckpointMismatchError, WorkerLostError

Key = TypeVar("Key")


@attrs.define(eq=False)
class _Waiter(Generic[Key]):
    key: Key
    admitted: asyncio.Future[None]


class WeightTurns(Generic[Key]):
    """Admits users of the weights that are in, and changes them when nobody uses them and others are wanted.

    Whoever has waited longest decides which weights come next, and then everybody who waits for these is admitted.
    While anybody waits, newcomers wait too, behind him: a stream of users of one set never starves another.
    """

    def __init__(self, switch: Callable[[Key], Awaitable[None]], present: Key) -> None:
        """``switch`` puts other weights in.

        It raises `CheckpointMismatchError` when these cannot be had and the present ones are untouched; whatever else
        it raises means that nobody can tell what is in, and ends all use.
        """
        self._switch = switch
        self.present = present
        """The weights that are in, or that are being replaced."""
        self._num_users = 0
        self._waiters: deque[_Waiter[Key]] = deque()
        self._switching: asyncio.Task[None] | None = None
        self._failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def using(self, key: Key) -> AsyncIterator[None]:
        """Hold weights in place; raises `CheckpointMismatchError`, or `WorkerLostError` once a change has failed."""
        await self._enter(key)
        try:
            yield
        finally:
            self._num_users -= 1
            self._advance()

    async def _enter(self, key: Key) -> None:
        waiter = _Waiter(key, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._advance()
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif waiter.admitted.done() and not waiter.admitted.cancelled() and waiter.admitted.exception() is None:
                self._num_users -= 1  # it was admitted at the very moment when it was given up
            self._advance()
            raise

    def _advance(self) -> None:
        """Do whatever can be done now; called after every change."""
        if self._failure.done():
            self._refuse(lambda _: True, WorkerLostError(self._failure.result()))
            return
        while self._waiters and self._waiters[0].admitted.cancelled():
            self._waiters.popleft()
        if self._switching is not None or not self._waiters:
            return
        head = self._waiters[0]
        if head.key == self.present:
            self._admit()
        elif self._num_users == 0:
            self._switching = asyncio.create_task(self._change(head.key))

    def _admit(self) -> None:
        for waiter in self._waiters:
            if waiter.key == self.present and not waiter.admitted.done():
                self._num_users += 1
                waiter.admitted.set_result(None)
        self._waiters = deque(waiter for waiter in self._waiters if not waiter.admitted.done())

    def _refuse(self, concerns: Callable[[Key], bool], error: Exception) -> None:
        for waiter in self._waiters:
            if concerns(waiter.key) and not waiter.admitted.done():
                waiter.admitted.set_exception(error)
        self._waiters = deque(waiter for waiter in self._waiters if not concerns(waiter.key))

    async def _change(self, key: Key) -> None:
        try:
            await self._switch(key)
            self.present = key
        except CheckpointMismatchError as error:
            self._refuse(lambda other: other == key, error)
        except Exception as error:
            if not self._failure.done():
                self._failure.set_result(f"the weights could not be changed: {type(error).__name__}: {error}")
        finally:
            self._switching = None
        self._advance()

    async def wait_failed(self) -> str:
        """The reason, as soon as a change has failed."""
        return await asyncio.shield(self._failure)

    @property
    def failure(self) -> str | None:
        """Why nobody can use anything any more, once a change has failed."""
        return self._failure.result() if self._failure.done() else None
