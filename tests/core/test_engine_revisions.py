"""Sampler weights that come and go, with their sampler and without it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tinker_core.engine.revisions import LiveWeights, Revisions
from tinker_core.errors import (
    DamagedRecordError,
    LostWeightsError,
    StorageError,
    UnknownCheckpointError,
    WorkerLostError,
)
from tinker_core.types import Transport, WeightsRef

MODEL = "s-1:train:0"


class Models:
    """Live models of a trainer: a number each."""

    def __init__(self) -> None:
        self.weights = {MODEL: 1}

    async def export(self, directory: Path) -> None:
        (directory / "weights").write_text(str(self.weights[MODEL]))


class Saved:
    """A checkpoint that may be deleted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Path]:
        if not await self.is_there():
            raise UnknownCheckpointError(str(self.directory))
        yield self.directory

    async def is_there(self) -> bool:
        return exists(self.directory)


def exists(directory: Path) -> bool:
    return directory.is_dir()


class NumberSampler:
    """Weights are a number; takes a step of the test's choosing for each retirement and each file."""

    def __init__(self, models: Models, max_revisions: int = 1) -> None:
        self.models = models
        self.resident: dict[str, int] = {}
        self.max_revisions = max_revisions
        self.retiring, self.may_retire = asyncio.Event(), asyncio.Event()
        self.writing, self.may_write = asyncio.Event(), asyncio.Event()
        self.may_retire.set()
        self.may_write.set()
        self.is_dead = False
        self.num_published = 0

    def capabilities(self) -> Any:
        return self

    def check(self) -> None:
        if self.is_dead:
            raise WorkerLostError("dead")

    async def publish(self, revision: str, ref: WeightsRef) -> None:
        self.check()
        assert revision not in self.resident
        assert len(self.resident) < self.max_revisions
        self.num_published += 1
        if ref.transport is Transport.IN_PROCESS:
            self.resident[revision] = self.models.weights[ref.model_id or ""]
        else:
            self.resident[revision] = int((Path(ref.directory or "") / "weights").read_text())

    async def save_revision(self, revision: str, directory: str) -> None:
        self.writing.set()
        await self.may_write.wait()
        self.check()
        (Path(directory) / "weights").write_text(str(self.resident[revision]))

    async def retire(self, revision: str) -> None:
        self.retiring.set()
        await self.may_retire.wait()
        self.check()
        del self.resident[revision]


def new(tmp_path: Path, max_revisions: int = 1) -> tuple[Revisions, Any, Models]:
    models = Models()
    revisions, sampler = Revisions(tmp_path / "revisions"), NumberSampler(models, max_revisions)
    revisions.load()
    revisions.attach(sampler)  # type: ignore[arg-type]
    return revisions, sampler, models


def name(request_id: str) -> str:
    return f"{MODEL}@{request_id}"


def live(model_id: str) -> LiveWeights:
    return lambda: nullcontext(WeightsRef(transport=Transport.IN_PROCESS, model_id=model_id))


async def publish(revisions: Revisions, models: Models, request_id: str) -> None:
    await revisions.publish_live(name(request_id), models.export, live(MODEL))


async def weights(revisions: Revisions, sampler: Any, request_id: str) -> int:
    async with revisions.use(name(request_id)) as held:
        return int(sampler.resident[held])


async def hold(revisions: Revisions, request_id: str) -> None:
    async with revisions.use(name(request_id)):
        pass


async def a_while() -> None:
    """Let everything go on that can."""
    for _ in range(50):
        await asyncio.sleep(0)


def stored(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "revisions").glob("*") if not path.name.startswith("."))


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted_again", [False, True])
def test_weights_dropped_while_they_make_room(tmp_path: Path, wanted_again: bool) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path)
        await publish(revisions, models, "old")
        sampler.may_retire.clear()
        newer = asyncio.create_task(publish(revisions, models, "new"))
        await sampler.retiring.wait()
        user = asyncio.create_task(weights(revisions, sampler, "old")) if wanted_again else None
        await asyncio.sleep(0)
        dropped = asyncio.create_task(revisions.drop(name("old")))
        await asyncio.sleep(0)
        sampler.may_retire.set()
        await asyncio.gather(newer, dropped)
        if user is not None:
            assert await user == 1  # whoever held it before it was dropped still gets it
        assert not revisions.knows(name("old"))
        assert await weights(revisions, sampler, "new") == 1
        assert set(sampler.resident) == {name("new")}
        assert [path.name for path in stored(tmp_path)] == ([] if not wanted_again else [stored(tmp_path)[0].name])

    asyncio.run(body())


def test_a_save_never_waits_for_samples_in_progress(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path)
        await publish(revisions, models, "old")
        async with revisions.use(name("old")):
            models.weights[MODEL] = 2
            await publish(revisions, models, "new")
            assert set(sampler.resident) == {name("old")}
            assert len(stored(tmp_path)) == 1
        models.weights[MODEL] = 3
        assert await weights(revisions, sampler, "new") == 2
        assert set(sampler.resident) == {name("new")}
        await revisions.drop(name("new"))
        await revisions.drop(name("old"))
        assert not stored(tmp_path)
        assert (revisions.num_resident, revisions.num_stored, revisions.stored_bytes) == (0, 0, 0)

    asyncio.run(body())


def test_cancelling_a_use_leaves_the_books_right(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path)
        for saved in ("a", "b"):
            (tmp_path / saved).mkdir()
            await models.export(tmp_path / saved)
            revisions.add_saved(name(saved), Saved(tmp_path / saved))
        await weights(revisions, sampler, "a")
        sampler.may_retire.clear()
        user = asyncio.create_task(weights(revisions, sampler, "b"))
        await sampler.retiring.wait()
        user.cancel()
        await asyncio.sleep(0)
        sampler.may_retire.set()
        with pytest.raises(asyncio.CancelledError):
            await user
        assert revisions.num_resident == len(sampler.resident)
        await weights(revisions, sampler, "b")
        await weights(revisions, sampler, "a")
        assert set(sampler.resident) == {name("a")}
        assert not stored(tmp_path)  # the files are somebody else's already

    asyncio.run(body())


def test_weights_whose_files_are_deleted_stay_while_the_sampler_runs(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path)
        saved = "tinker://s-1:train:0/sampler_weights/x@r1"
        (tmp_path / "saved").mkdir()
        await models.export(tmp_path / "saved")
        revisions.add_saved(saved, Saved(tmp_path / "saved"))
        async with revisions.use(saved):
            pass
        (tmp_path / "saved" / "weights").unlink()
        (tmp_path / "saved").rmdir()
        await publish(revisions, models, "other")  # which takes its place
        async with revisions.use(saved):
            assert sampler.resident == {saved: 1}
        revisions.detach()
        again = Revisions(tmp_path / "revisions")
        again.load()
        assert not again.knows(saved)  # its sampling sessions look for the checkpoint again
        assert again.knows(name("other"))

    asyncio.run(body())


# --- files ------------------------------------------------------------------------------------------------------------


def test_persisted_weights_outlive_the_sampler_and_the_process(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path, max_revisions=4)
        for number, request_id in enumerate(("a", "b", "c")):
            models.weights[MODEL] = 10 + number
            await publish(revisions, models, request_id)
        await revisions.publish_live("s-2:train:0@d", models.export, live(MODEL))
        await revisions.persist(MODEL)
        assert (revisions.num_stored, len(sampler.resident)) == (3, 4)  # nothing has left the sampler
        assert revisions.stored_bytes == 6
        await revisions.drop(name("b"))
        revisions.detach()
        with pytest.raises(WorkerLostError):
            await weights(revisions, sampler, "a")

        (tmp_path / "revisions" / ".incoming" / "half").mkdir(parents=True)
        again, sampler, models = new(tmp_path)
        assert again.ephemeral() == [name("a"), name("c")]
        assert not list((tmp_path / "revisions").glob(".*"))
        models.weights[MODEL] = 99
        await publish(again, models, "c")  # a replay
        assert await weights(again, sampler, "c") == 12
        assert await weights(again, sampler, "a") == 10
        with pytest.raises(UnknownCheckpointError):
            await weights(again, sampler, "b")

    asyncio.run(body())


def test_damaged_files_are_named_and_never_used(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path, max_revisions=4)
        for request_id in ("a", "b", "c", "d"):
            await publish(revisions, models, request_id)
        await revisions.persist(MODEL)
        flipped, missing, extra, seal = stored(tmp_path)
        (flipped / "weights").write_text("2")
        (missing / "weights").unlink()
        (extra / "more").write_text("")
        (seal / "seal.json").write_text(json.dumps({"name": name("d")}))
        again, sampler, models = new(tmp_path)
        for request_id, file in (("a", flipped / "weights"), ("b", missing / "weights"), ("c", extra / "more")):
            with pytest.raises(DamagedRecordError, match=str(file)):
                await weights(again, sampler, request_id)
        assert not again.knows(name("d"))
        assert sampler.num_published == 0
        again.expect(name("d"))  # a replay brings it back, over the damaged directory
        await publish(again, models, "d")
        await again.persist(MODEL)
        assert json.loads((seal / "seal.json").read_text())["sha256"]

    asyncio.run(body())


def test_a_failed_write_leaves_the_weights_in_the_sampler_and_no_file(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path)
        await publish(revisions, models, "a")

        async def full(revision: str, directory: str) -> None:
            (Path(directory) / "weights").write_text("half")
            raise StorageError("no space left")

        write, sampler.save_revision = sampler.save_revision, full
        for attempt in (revisions.persist(MODEL), publish(revisions, models, "b")):
            with pytest.raises(StorageError):
                await attempt
        assert not revisions.knows(name("b"))
        assert not stored(tmp_path)
        assert not list((tmp_path / "revisions" / ".incoming").iterdir())
        assert await weights(revisions, sampler, "a") == 1
        sampler.save_revision = write
        await revisions.persist(MODEL)
        assert len(stored(tmp_path)) == 1

    asyncio.run(body())


def test_dropped_while_they_are_written_weights_leave_no_file(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path)
        await publish(revisions, models, "a")
        sampler.may_write.clear()
        writing = asyncio.create_task(revisions.persist(MODEL))
        await sampler.writing.wait()
        dropping = asyncio.create_task(revisions.drop(name("a")))
        await asyncio.sleep(0)
        await publish(revisions, models, "a")  # a replay of something that is given up changes nothing
        sampler.may_write.set()
        await asyncio.gather(writing, dropping)
        assert not stored(tmp_path)
        assert not sampler.resident
        assert not revisions.knows(name("a"))

    asyncio.run(body())


# --- workers that die -------------------------------------------------------------------------------------------------


def test_weights_without_files_are_waited_for_until_they_are_published_again(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path, max_revisions=2)
        await publish(revisions, models, "a")
        sampler.is_dead = True
        revisions.detach()
        user = asyncio.create_task(hold(revisions, "a"))
        await asyncio.sleep(0)
        for _ in range(2):  # they die once more before the replay comes so far
            sampler = NumberSampler(models)
            revisions.attach(sampler)
            assert revisions.knows(name("a"))
            assert not user.done()
            revisions.detach()
        sampler = NumberSampler(models)
        revisions.attach(sampler)
        revisions.expect(name("a"))
        revisions.expect(name("later"))
        later = asyncio.create_task(weights(revisions, sampler, "later"))
        await publish(revisions, models, "a")
        await publish(revisions, models, "later")
        assert await later == 1
        await user

    asyncio.run(body())


def test_whoever_waits_for_weights_of_a_lost_model_learns_why(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path, max_revisions=4)
        await publish(revisions, models, "kept")
        await revisions.persist(MODEL)
        revisions.expect(name("a"))
        revisions.expect("s-2:train:0@b")
        waiting = asyncio.create_task(weights(revisions, sampler, "a"))
        other = asyncio.create_task(revisions.use("s-2:train:0@b").__aenter__())
        await asyncio.sleep(0)
        revisions.give_up(MODEL, DamagedRecordError("the snapshot is damaged"))
        with pytest.raises(LostWeightsError, match="the snapshot is damaged"):
            await waiting
        with pytest.raises(LostWeightsError, match="the snapshot is damaged"):
            await weights(revisions, sampler, "a")
        assert await weights(revisions, sampler, "kept") == 1
        assert not other.done()
        revisions.give_up(None, WorkerLostError("it cannot start"))
        with pytest.raises(LostWeightsError, match="it cannot start"):
            await other
        revisions.expect(name("a"))
        await publish(revisions, models, "a")
        assert await weights(revisions, sampler, "a") == 1

    asyncio.run(body())


def test_a_sampler_that_dies_while_weights_move_leaves_the_books_right(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path)
        await publish(revisions, models, "a")
        await revisions.persist(MODEL)
        sampler.may_retire.clear()
        saving = asyncio.create_task(publish(revisions, models, "b"))
        await sampler.retiring.wait()
        sampler.is_dead = True
        revisions.detach()
        sampler.may_retire.set()
        with pytest.raises(WorkerLostError):
            await saving
        assert not revisions.knows(name("b"))
        sampler = NumberSampler(models)
        revisions.attach(sampler)
        assert revisions.num_resident == 0
        assert await weights(revisions, sampler, "a") == 1
        await publish(revisions, models, "b")
        assert await weights(revisions, sampler, "b") == 1

    asyncio.run(body())


def test_who_waits_for_room_when_the_sampler_dies_is_told_so(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path)
        await publish(revisions, models, "a")
        async with revisions.use(name("a")):
            await publish(revisions, models, "b")
            waiting = asyncio.create_task(weights(revisions, sampler, "b"))
            await a_while()
            assert not waiting.done()
            gone = asyncio.create_task(revisions.wait_detached(sampler))
            revisions.detach()
            with pytest.raises(WorkerLostError):
                await waiting
            await gone
            await revisions.drop(name("a"))
        assert revisions.ephemeral() == [name("b")]

    asyncio.run(body())


def test_weights_are_secured_though_the_sampler_dies_while_they_are_written(tmp_path: Path) -> None:
    async def body() -> None:
        revisions, sampler, models = new(tmp_path, max_revisions=4)
        await publish(revisions, models, "a")
        await publish(revisions, models, "b")
        async with revisions.use(name("b")):
            await revisions.drop(name("b"))  # which nobody waits for
            sampler.may_write.clear()
            securing = asyncio.create_task(revisions.secure(MODEL))
            await sampler.writing.wait()
            sampler.is_dead = True
            sampler.may_write.set()
            await a_while()
            assert not securing.done()
            revisions.detach()
        revisions.attach(NumberSampler(models))  # type: ignore[arg-type]
        await a_while()
        assert not securing.done()
        await publish(revisions, models, "a")
        await securing
        assert len(stored(tmp_path)) == 1

    asyncio.run(body())
