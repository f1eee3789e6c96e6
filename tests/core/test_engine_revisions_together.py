"""Everything that can happen to sampler weights at once, in a seeded disorder."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.core.test_engine_revisions import MODEL, Models, NumberSampler, live, name
from tinker_core.engine.revisions import Revisions
from tinker_core.errors import LostWeightsError, UnknownCheckpointError, WorkerLostError
from tinker_core.types import WeightsRef

ROOM = 3
SAVES = 25


class SlowSampler(NumberSampler):
    """Takes its time for everything, a different one each time, and has no room beyond what it says."""

    def __init__(self, models: Models, order: random.Random) -> None:
        super().__init__(models, ROOM)
        self.order = order

    async def take_time(self) -> None:
        for _ in range(self.order.randrange(4)):
            await asyncio.sleep(0)
        self.check()

    async def publish(self, revision: str, ref: WeightsRef) -> None:
        await self.take_time()
        await super().publish(revision, ref)
        await self.take_time()

    async def save_revision(self, revision: str, directory: str) -> None:
        await self.take_time()
        await super().save_revision(revision, directory)
        await self.take_time()

    async def retire(self, revision: str) -> None:
        await self.take_time()
        await super().retire(revision)


class Disorder:
    """One trainer that saves, drops and replays; samples that begin and are cancelled; workers that die."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.order = random.Random(seed)
        self.models = Models()
        self.revisions = Revisions(directory)
        self.revisions.load()
        self.saved: dict[str, int] = {}
        self.dropped: set[str] = set()
        self.done = asyncio.Event()
        self.start_workers()

    def start_workers(self) -> None:
        self.sampler: Any = SlowSampler(self.models, self.order)
        self.revisions.attach(self.sampler)

    async def kill_workers(self) -> None:
        while not self.done.is_set():
            for _ in range(self.order.randrange(20, 200)):
                await asyncio.sleep(0)
            self.sampler.is_dead = True
            self.revisions.detach()
            await asyncio.sleep(0)
            self.start_workers()

    async def publish(self, request_id: str, weights: int) -> None:
        while True:
            try:
                self.models.weights[MODEL] = weights
                return await self.revisions.publish_live(name(request_id), self.models.export, live(MODEL))
            except WorkerLostError:
                await asyncio.sleep(0)  # until there are workers
                await self.replay()

    async def replay(self) -> None:
        for request_id, weights in list(self.saved.items()):
            if request_id not in self.dropped:
                await self.publish(request_id, weights)

    async def train(self) -> None:
        for number in range(SAVES):
            await self.publish(str(number), number)
            self.saved[str(number)] = number
            if self.order.random() < 0.3:
                self.dropped.add(request_id := self.order.choice(list(self.saved)))
                await self.revisions.drop(name(request_id))
            if self.order.random() < 0.2:
                try:
                    await self.revisions.persist(MODEL)
                except WorkerLostError:
                    continue
            await self.replay()

    async def sample(self) -> None:
        request_id = self.order.choice(list(self.saved))
        try:
            async with self.revisions.use(name(request_id)):
                found = self.sampler.resident.get(name(request_id))  # None: the workers have just died
                assert found in (None, self.saved[request_id])
                for _ in range(self.order.randrange(5)):
                    await asyncio.sleep(0)
        except WorkerLostError:
            return
        except (UnknownCheckpointError, LostWeightsError):
            assert request_id in self.dropped

    async def sample_often(self, *, cancelling: bool) -> None:
        while not self.done.is_set():
            await asyncio.sleep(0)
            if not self.saved:
                continue
            task = asyncio.create_task(self.sample())
            if cancelling:
                for _ in range(self.order.randrange(8)):
                    await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()


@pytest.mark.parametrize("seed", range(2))
def test_no_weights_are_lost_mixed_up_or_waited_for_in_vain(tmp_path: Path, seed: int) -> None:
    async def body() -> None:
        disorder = Disorder(tmp_path / "revisions", seed)
        revisions = disorder.revisions
        samples = [asyncio.create_task(disorder.sample_often(cancelling=number < 2)) for number in range(6)]
        killing = asyncio.create_task(disorder.kill_workers())
        await disorder.train()
        disorder.done.set()
        await killing
        await disorder.replay()
        await asyncio.wait_for(asyncio.gather(*samples), 60)
        for request_id in disorder.dropped:
            await revisions.drop(name(request_id))
        kept = {name(request_id) for request_id in disorder.saved.keys() - disorder.dropped}
        assert set(revisions.ephemeral()) == kept
        assert revisions.num_resident == len(disorder.sampler.resident)
        for request_id in disorder.saved.keys() - disorder.dropped:
            async with revisions.use(name(request_id)):
                assert disorder.sampler.resident[name(request_id)] == disorder.saved[request_id]
        await revisions.persist(MODEL)
        again = Revisions(tmp_path / "revisions")
        again.load()
        assert set(again.ephemeral()) == kept

    asyncio.run(body())
