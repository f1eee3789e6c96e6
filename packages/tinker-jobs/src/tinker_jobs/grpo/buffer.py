"""The bounded experience buffer between rollout workers and the learner."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class ExperienceBuffer(Generic[T]):
    """Holds what is ready to be trained on, and a place for everything that is under way.

    Who makes an item reserves its place before it begins, so that makers wait for the learner rather than run ahead of
    it further than ``size``.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._places = asyncio.Semaphore(size)
        self._ready: asyncio.Queue[T] = asyncio.Queue()
        self._reserved = 0

    @property
    def reserved(self) -> int:
        """Items that are under way or ready."""
        return self._reserved

    async def reserve(self) -> None:
        """Wait for a place for one item."""
        await self._places.acquire()
        self._reserved += 1

    def put(self, item: T) -> None:
        """Add an item to the place that was reserved for it."""
        self._ready.put_nowait(item)

    async def take(self, count: int) -> list[T]:
        """The first items that get ready; their places are free again when all of them are there."""
        items = [await self._ready.get() for _ in range(count)]
        for _ in items:
            self._reserved -= 1
            self._places.release()
        return items
