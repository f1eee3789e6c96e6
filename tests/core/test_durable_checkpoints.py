"""Checkpoints when processes die, requests are repeated, and there are too many of them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.core.checkpoint_lab import Death, Fuse, Lab, open_lab, path_of
from tests.object_store import BUCKET, S3Server, serve_s3
from tinker_core.engine.housekeeping import REMEMBERED
from tinker_core.errors import CheckpointExistsError, DatabaseUnavailableError, StorageError
from tinker_core.storage.checkpoints import location_of_record
from tinker_core.types import LOCAL_OWNER, CheckpointType


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@attrs.define(eq=False)
class Place:
    """Where the files of a test are, in one directory per attempt."""

    directory: Path
    server: S3Server | None

    def options(self, attempt: int) -> dict[str, Any]:
        data_dir = self.directory / f"data-{attempt}"
        if self.server is None:
            return {"data_dir": data_dir}
        return {"data_dir": data_dir, "url": f"s3://{BUCKET}/{self.directory.name}/{attempt}"}

    def versions(self, attempt: int) -> set[Path]:
        root = self.directory / f"data-{attempt}" / "checkpoints"
        if self.server is not None:
            root = self.server.bucket / self.directory.name / str(attempt)
        return {file.parent for file in root.rglob("*") if file.is_file()}


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "local":
        return Place(tmp_path, None)
    server: S3Server = request.getfixturevalue("server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return Place(tmp_path, server)


@pytest.fixture
def migrated(tmp_path: Path) -> Path:
    """An empty control database, for the many that a test needs."""

    async def body() -> None:
        async with open_lab(tmp_path / "migrated"):
            pass

    asyncio.run(body())
    return tmp_path / "migrated" / "control.sqlite"


def test_a_save_that_replaces_is_whole_or_not_there_wherever_the_process_dies(place: Place, migrated: Path) -> None:
    async def attempt(steps: int) -> bool:
        """Whether the process lived to the end."""
        options, fuse = place.options(steps), Fuse(steps)
        options["data_dir"].mkdir()
        shutil.copy(migrated, options["data_dir"])
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with open_lab(**options) as lab:
                await lab.save("x", "old", "first")
                fuse.attach(lab, monkeypatch)
                try:
                    await lab.save("x", "new", "second")
                    await lab.housekeeping.tidy()
                    fuse.burn()
                except Death:
                    pass
        async with open_lab(**options) as lab:
            await lab.housekeeping.tidy()
            done = await lab.checkpoints.finished_save("second")
            assert await lab.read("x") == ("old" if done is None else "new")
            assert len(place.versions(steps)) == 1
            assert lab.checkpoints.stored_bytes(LOCAL_OWNER) == 6
            if done is None:  # the request is executed again
                await lab.save("x", "new", "second")
                await lab.housekeeping.tidy()
                assert await lab.read("x") == "new"
                assert len(place.versions(steps)) == 1
            assert await lab.checkpoints.finished_save("second") == path_of("x")
        return not fuse.dead

    steps = 0
    while not asyncio.run(attempt(steps)):
        steps += 1
    assert steps >= 8


def test_a_removal_that_was_acknowledged_is_final_wherever_the_process_dies(place: Place, migrated: Path) -> None:
    async def attempt(steps: int) -> bool:
        options, fuse, acknowledged = place.options(steps), Fuse(steps), False
        options["data_dir"].mkdir()
        shutil.copy(migrated, options["data_dir"])
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with open_lab(**options) as lab:
                await lab.save("x", "old", "first")
                fuse.attach(lab, monkeypatch)
                try:
                    await lab.checkpoints.delete(str(path_of("x")), LOCAL_OWNER)
                    acknowledged = True
                    await lab.housekeeping.tidy()
                    fuse.burn()
                except Death:
                    pass
        async with open_lab(**options) as lab:
            await lab.housekeeping.tidy()
            there = await lab.read("x")
            assert there in ((None,) if acknowledged else (None, "old"))
            assert len(place.versions(steps)) == (there is not None)
            with pytest.raises(StorageError, match="'first' has saved"):
                await lab.save("x", "again", "first")
            assert await lab.checkpoints.finished_save("first") == path_of("x")
        return not fuse.dead

    steps = 0
    while not asyncio.run(attempt(steps)):
        steps += 1
    assert steps >= 3


def run(place: Place, body: Any, **options: Any) -> None:
    async def whole() -> None:
        async with open_lab(**place.options(0), **options) as lab:
            await body(lab)

    asyncio.run(whole())


def test_another_server_on_the_same_database_leaves_a_save_in_progress_alone(place: Place) -> None:
    async def body(lab: Lab) -> None:
        real = lab.checkpoints.store.publish

        async def publish(directory: Path, location: str) -> None:
            await real(directory, location)
            other = place.options(1) | {"database": f"sqlite:///{place.options(0)['data_dir'] / 'control.sqlite'}"}
            async with open_lab(**other | {"url": place.options(0).get("url")}, writer="other") as stranger:
                await stranger.housekeeping.tidy()

        lab.checkpoints.store.publish = publish  # type: ignore[method-assign]
        await lab.save("x", "text", "r")
        assert await lab.read("x") == "text"

    run(place, body)


def test_a_commit_that_the_database_took_although_it_was_lost_counts(place: Place) -> None:
    async def body(lab: Lab) -> None:
        await lab.save("x", "old", "first")
        saves = lab.control.checkpoint_saves
        real = saves.finish

        async def finish(*args: Any, **kwargs: Any) -> None:
            await real(*args, **kwargs)
            raise DatabaseUnavailableError

        saves.finish = finish  # type: ignore[method-assign,assignment]
        await lab.save("x", "newer", "second")
        await lab.housekeeping.tidy()
        assert await lab.read("x") == "newer"
        assert lab.checkpoints.stored_bytes(LOCAL_OWNER) == 10
        assert len(place.versions(0)) == 1

    run(place, body)


def test_a_failed_save_leaves_no_files(place: Place) -> None:
    async def body(lab: Lab) -> None:
        with pytest.raises(OSError, match="no/such/directory"):
            await lab.save("x", "half", "r", parts=("a", "no/such/directory"))
        both = await asyncio.gather(
            *(lab.save("y", text, text, overwrite=False) for text in ("one", "two")), return_exceptions=True
        )
        (lost,) = (error for error in both if error is not None)
        assert isinstance(lost, CheckpointExistsError)
        await lab.housekeeping.tidy()
        assert len(place.versions(0)) == 1
        assert await lab.record("x") is None

    run(place, body)


def test_what_is_being_read_is_removed_afterwards(place: Place) -> None:
    async def body(lab: Lab) -> None:
        await lab.save("x", "text", "r")
        record = await lab.record("x")
        assert record is not None
        async with lab.checkpoints.reading(record) as directory:
            await lab.checkpoints.delete(str(record.path), LOCAL_OWNER)
            await lab.housekeeping.tidy()
            assert (directory / "a.safetensors").read_text() == "text"
            lab.checkpoints.untidy.clear()
        assert lab.checkpoints.untidy.is_set()
        await lab.housekeeping.tidy()
        assert place.versions(0) == set()

    run(place, body)


def test_the_newest_training_checkpoints_of_a_run_are_kept(place: Place) -> None:
    async def body(lab: Lab) -> None:
        await lab.save("sampler", "text", "r-sampler", kind=CheckpointType.SAMPLER)
        for name in ("public", "aging", "read", "a", "b"):
            await lab.clock.advance(1)
            await lab.save(name, "text", f"r-{name}", ttl_seconds=3600 if name == "aging" else None)
            await lab.control.checkpoint_queries.set_public(path_of(name), name == "public")
        record = await lab.record("read")
        assert record is not None
        async with lab.checkpoints.reading(record):
            await lab.housekeeping.tidy()
            assert await lab.names() == ["sampler", "public", "aging", "read", "a", "b"]
        await lab.save("c", "text", "r-c")
        await lab.housekeeping.tidy()
        assert await lab.names() == ["sampler", "public", "aging", "b", "c"]
        assert len(place.versions(0)) == 5
        audit = lab.checkpoints._accounts.audit
        entries = await audit.entries(LOCAL_OWNER, lab.clock.now() - timedelta(1), lab.clock.now() + timedelta(1))
        retired = [entry.details for entry in entries if entry.event == "checkpoint_retired"]
        assert [(str(each["tinker_path"]).rpartition("/")[2], each["keep_last"]) for each in retired] == [
            ("a", 2),
            ("read", 2),
        ]

    run(place, body, keep_last=2)


def test_finished_saves_are_forgotten_after_a_month(place: Place) -> None:
    async def body(lab: Lab) -> None:
        await lab.save("x", "text", "r")
        await lab.clock.advance(REMEMBERED.total_seconds())
        await lab.housekeeping.tidy()
        assert await lab.checkpoints.finished_save("r") == path_of("x")
        await lab.clock.advance(1)
        await lab.housekeeping.tidy()
        assert await lab.checkpoints.finished_save("r") is None
        assert await lab.read("x") == "text"

    run(place, body)


def test_files_that_cannot_be_removed_now_are_removed_later(place: Place) -> None:
    async def body(lab: Lab) -> None:
        await lab.save("x", "text", "r")
        real = lab.checkpoints.store.remove

        async def remove(location: str) -> None:
            raise StorageError("the bucket is gone")

        lab.checkpoints.store.remove = remove  # type: ignore[method-assign]
        await lab.checkpoints.delete(str(path_of("x")), LOCAL_OWNER)
        with pytest.raises(StorageError, match="bucket is gone"):
            await lab.housekeeping.tidy()
        assert await lab.read("x") is None
        lab.checkpoints.store.remove = real  # type: ignore[method-assign]
        await lab.housekeeping.tidy()
        assert place.versions(0) == set()

    run(place, body)


def test_saves_and_removals_are_one_transaction_on_every_database(database: str, tmp_path: Path) -> None:
    async def body() -> None:
        async with open_lab(tmp_path / "data", database=database) as lab:
            saves = lab.control.checkpoint_saves
            await lab.save("x", "old", "first")
            old = await lab.record("x")
            assert old is not None
            with pytest.raises(CheckpointExistsError):
                await lab.save("x", "new", "second", overwrite=False)
            assert await saves.finished("second") is None
            await lab.save("x", "new", "second")
            assert await saves.loose() == [location_of_record(old)]
            assert await saves.remove(old, lab.clock.now()) is False  # it is another one by now
            await lab.housekeeping.tidy()
            assert await saves.loose() == []
            expired = attrs.evolve(old, expires_at=lab.clock.now(), request_id="third", version="v3")
            with pytest.raises(StorageError, match="given up"):
                await saves.finish(expired, overwrite=True)
            assert await lab.read("x") == "new"

    asyncio.run(body())
