"""Rollout workers that may die at any time, and the prompts that they are given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from tinker_jobs.errors import JobFailedError
from tinker_jobs.grpo.groups import Asked, PromptGroup, PublishedPolicy

START_SECONDS = 300.0
"""How long a pool without any worker waits for one: a cluster may have to add a machine."""
MAX_ATTEMPTS = 5
"""Workers that may die of one prompt."""


class RolloutWorkerLostError(Exception):
    """A worker that cannot be used any more, with why. What it was doing is to be done by another."""


class Worker(Protocol):
    """One rollout worker."""

    @property
    def name(self) -> str:
        """For the job's log."""

    async def start(self) -> None:
        """Return when it can work. Raises `RolloutWorkerLostError`, or `JobFailedError` if no other could either."""

    async def roll_out(self, asked: Asked, policy: PublishedPolicy) -> PromptGroup:
        """Answer a prompt. Raises `RolloutWorkerLostError`, or `JobFailedError` if no other could either."""

    def stop(self) -> None:
        """End it, whatever it is doing; it may be dead already."""


class WorkerPool:
    """Gives prompts to workers, and those of a worker that is lost to others.

    Each prompt is answered exactly once: it goes to another worker only when the one that had it can no longer answer.
    A new worker takes the place of a lost one. The pool fails with `JobFailedError` when it has had no worker for
    ``start_seconds``, or workers die and die without finishing anything.
    """

    def __init__(
        self,
        spawn: Callable[[], Worker],
        *,
        num_workers: int,
        prompts_per_worker: int,
        tasks: asyncio.TaskGroup,
        log: Callable[..., None],
        start_seconds: float = START_SECONDS,
    ) -> None:
        """``prompts_per_worker`` are answered by each at once. ``tasks`` is left with an error when the pool fails."""
        self._spawn = spawn
        self._num_workers = num_workers
        self._prompts_per_worker = prompts_per_worker
        self._tasks = tasks
        self._log = log
        self._start_seconds = start_seconds
        self._working: dict[Worker, set[int]] = {}
        self._starting: dict[Worker, asyncio.Task[None]] = {}
        self._free: asyncio.Queue[Worker] = asyncio.Queue()
        self._any_ready = asyncio.Event()
        self._expecting: asyncio.Task[None] | None = None
        self._lost_in_a_row = 0
        self.num_lost = 0
        """Workers that were lost so far."""

    def start(self) -> None:
        """Begin to start workers."""
        for _ in range(self._num_workers):
            self._add()
        self._expecting = self._tasks.create_task(self._expect_worker())

    def close(self) -> None:
        """End all workers."""
        for task in (*self._starting.values(), *([self._expecting] if self._expecting else [])):
            task.cancel()
        for worker in (*self._working, *self._starting):
            worker.stop()

    async def roll_out(self, asked: Asked, policy: Callable[[], PublishedPolicy]) -> PromptGroup:
        """Have a prompt answered, by the policy of the moment at which a worker takes it. Raises `JobFailedError`."""
        for _ in range(MAX_ATTEMPTS):
            worker = await self._next_free()
            self._working[worker].add(asked.position)
            try:
                group = await worker.roll_out(asked, policy())
            except RolloutWorkerLostError as error:
                self._lose(worker, error)
                continue
            if worker in self._working:  # else it was lost to another prompt, and this was its last answer
                self._working[worker].discard(asked.position)
                self._free.put_nowait(worker)
            self._lost_in_a_row = 0
            return group
        raise JobFailedError(f"{asked.prompt.where}: {MAX_ATTEMPTS} rollout workers died while answering it")

    async def _next_free(self) -> Worker:
        while True:
            worker = await self._free.get()
            if worker in self._working:
                return worker

    def _add(self) -> None:
        worker = self._spawn()
        self._starting[worker] = self._tasks.create_task(self._start(worker))

    async def _start(self, worker: Worker) -> None:
        try:
            await worker.start()
        except RolloutWorkerLostError as error:
            self._lose(worker, error)
            return
        del self._starting[worker]
        self._working[worker] = set()
        for _ in range(self._prompts_per_worker):
            self._free.put_nowait(worker)
        self._any_ready.set()
        self._log(f"rollout worker {worker.name} is ready", num_workers=len(self._working))

    def _lose(self, worker: Worker, error: RolloutWorkerLostError) -> None:
        """Replace a worker; each of its prompts finds out for itself, and only the first one counts."""
        if worker not in self._working and worker not in self._starting:
            return
        self._starting.pop(worker, None)
        unfinished = sorted(self._working.pop(worker, ()))
        worker.stop()
        self.num_lost += 1
        self._lost_in_a_row += 1
        self._log(
            f"rollout worker {worker.name} was lost ({error}); "
            f"its {len(unfinished)} unfinished prompts go to others, and a new worker takes its place",
            level="warning",
            unfinished_prompts=unfinished,
            num_workers=len(self._working),
        )
        if self._lost_in_a_row > 3 * self._num_workers:
            raise JobFailedError(f"{self._lost_in_a_row} rollout workers died in a row; the last one: {error}")
        self._add()
        if not self._working and self._any_ready.is_set():
            self._any_ready.clear()
            self._expecting = self._tasks.create_task(self._expect_worker())

    async def _expect_worker(self) -> None:
        try:
            async with asyncio.timeout(self._start_seconds):
                await self._any_ready.wait()
        except TimeoutError:
            raise JobFailedError(
                f"no rollout worker has started for {self._start_seconds:g} s: the Ray cluster has no node or no free "
                "CPU for one"
            ) from None
