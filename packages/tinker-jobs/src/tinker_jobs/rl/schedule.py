"""When rollouts are drawn and by which weights: one step after the other, or ahead while the model trains.

The model's version is the number of optimizer steps that it has behind it, so step s is taken by version s - 1. If
the oldest weights that drew its rollouts are of version v, these are s - 1 - v steps off policy. That is bounded before
anything is drawn: a step's rollouts begin only when they will be young enough at their turn, which comes at a known
version, because groups are used in the order of their steps. So at most ``max_steps_off_policy`` groups are ahead of
the one that is used next, and with the policy refreshed after each step that many are.

The policy is refreshed before step s when s - 1 is a multiple of ``weight_sync_interval``, and sooner where otherwise
no rollouts of step s could be young enough: the bound goes before the interval.

Sampling clients share one target that moves with every refreshment (``kind="inflight"``), so that the server keeps one
set of weights rather than one for each step. What was begun before a refreshment may finish under newer weights; its
version, the oldest, stays true, and its log-probabilities are those of whatever drew each completion.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

import attrs

from tinker_jobs.rl.rollouts import Policy, RolloutGroup, RolloutSource


@attrs.frozen(kw_only=True)
class Plan:
    """How drawing and training take turns."""

    first_step: int
    """The step to begin with, from 1."""
    num_steps: int
    groups_ahead: int
    """Groups that may be under way or ready beyond the one that is used next; 0 draws and trains in turn."""
    weight_sync_interval: int
    max_staleness: int | None
    """Optimizer steps; None is no bound but that of ``weight_sync_interval``, and needs ``groups_ahead`` 0."""
    eval_interval: int | None = None
    """Steps from one evaluation to the next; None for no evaluation."""


class Schedule:
    """Draws the groups of a plan from a source."""

    def __init__(
        self,
        plan: Plan,
        source: RolloutSource,
        *,
        refresh: Callable[[int], Awaitable[Policy]],
        report: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        """``refresh`` publishes the model's weights, of the version that it is told. ``report`` is given the step and
        the metrics of an evaluation."""
        self._plan = plan
        self._source = source
        self._refresh = refresh
        self._report = report
        self._policy: Policy | None = None
        self._pending: deque[asyncio.Task[RolloutGroup]] = deque()
        self._evaluation: asyncio.Task[None] | None = None
        self._next = plan.first_step
        self.num_syncs = 0
        """Times that the policy was refreshed."""

    @property
    def synced_version(self) -> int:
        """The version that the policy has at least."""
        return -1 if self._policy is None else self._policy.version

    @property
    def generation_step(self) -> int:
        """The last step whose rollouts were begun."""
        return self._next - 1

    @property
    def num_pending(self) -> int:
        """Groups ahead of the one that was given out last."""
        return len(self._pending)

    async def groups(self) -> AsyncGenerator[RolloutGroup, None]:
        """One group for each step, in order. The model must have trained on one before the next is asked for.

        Closing it ends what is under way. Raises `JobFailedError`.
        """
        try:
            for step in range(self._plan.first_step, self._plan.num_steps + 1):
                if self._must_sync(step):
                    await self._sync(step - 1)
                self._draw(step)
                yield await self._pending.popleft()
            await self._finish_evaluation()
        finally:
            await self._end()

    def _must_sync(self, step: int) -> bool:
        version = step - 1
        if self._policy is None:
            return True
        if self._policy.version == version:
            return False
        return version % self._plan.weight_sync_interval == 0 or (self._next == step and not self._is_young(step))

    def _is_young(self, step: int) -> bool:
        """Whether rollouts that the policy draws now are young enough at their step."""
        bound = self._plan.max_staleness
        return bound is None or step - 1 - self.synced_version <= bound

    async def _sync(self, version: int) -> None:
        await self._finish_evaluation()  # which is of one version alone
        self._policy = await self._refresh(version)
        self.num_syncs += 1

    def _draw(self, step: int) -> None:
        assert self._policy is not None
        last = min(step + self._plan.groups_ahead, self._plan.num_steps)
        while self._next <= last and self._is_young(self._next):
            self._begin(self._next, self._policy)
            self._next += 1

    def _begin(self, step: int, policy: Policy) -> None:
        self._pending.append(asyncio.create_task(self._collect(step, policy)))
        if self._plan.eval_interval is not None and step % self._plan.eval_interval == 0:
            self._evaluation = asyncio.create_task(self._evaluate(step, policy, self._evaluation))

    async def _collect(self, step: int, policy: Policy) -> RolloutGroup:
        rollouts = await self._source.collect(step, policy)
        return RolloutGroup(step=step, version=policy.version, rollouts=rollouts)

    async def _evaluate(self, step: int, policy: Policy, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        metrics = await self._source.evaluate(policy)
        if metrics:
            self._report(step, metrics)

    async def _finish_evaluation(self) -> None:
        if self._evaluation is not None:
            await self._evaluation
            self._evaluation = None

    async def _end(self) -> None:
        tasks: list[asyncio.Task[RolloutGroup] | asyncio.Task[None]] = [*self._pending]
        if self._evaluation is not None:
            tasks.append(self._evaluation)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
