"""The files of checkpoints: one set of tests for a local directory and for S3."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import obstore
import pytest

from tests.object_store import BUCKET, S3Server, serve_s3
from tinker_core.errors import ConfigurationError, DamagedRecordError, InvalidRequestError, StorageError
from tinker_core.storage import CheckpointStore
from tinker_core.storage import remote_checkpoints as remote
from tinker_core.storage.checkpoints import (
    files_of,
    location_of,
    new_version,
    open_checkpoint_store,
    safe_directory_name,
)
from tinker_core.types import CheckpointType, TinkerPath

PATH = TinkerPath.parse("tinker://s1:train:0/weights/step-1")
LEGACY = location_of(PATH, None)


@attrs.define(eq=False)
class Kept:
    """A store, and the directory in which its files can be seen."""

    url: str | None
    root: Path
    data_dir: Path
    cache_bytes: int = 1024**3
    store: CheckpointStore = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.store = open_checkpoint_store(self.url, self.data_dir, self.cache_bytes, "me")

    async def save(self, text: str, path: TinkerPath = PATH) -> str:
        location = location_of(path, new_version())
        directory = await self.store.begin()
        (directory / "inner").mkdir()
        (directory / "inner" / "weights.safetensors").write_text(text)
        (directory / "tinker.json").write_text("{}")
        assert await self.store.seal(directory, location) == len(text.encode()) + 2
        await self.store.publish(directory, location)
        await self.store.end(directory)
        return location

    async def read(self, location: str) -> str:
        async with self.store.reading(location) as directory:
            return (directory / "inner" / "weights.safetensors").read_text()

    # What others do to the files, behind the store's back.

    def files(self) -> list[str]:
        """Names of all files, in order."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def put(self, name: str, content: bytes) -> None:
        if self.url is not None:
            obstore.put(remote.open_store(self.url), name, content)
            return
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(content)

    def delete(self, name: str) -> None:
        if self.url is not None:
            obstore.delete(remote.open_store(self.url), name)
        else:
            (self.root / name).unlink()

    def open_again(self) -> Kept:
        return Kept(self.url, self.root, self.data_dir, self.cache_bytes)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    prefix = f"a/{tmp_path.name}"
    return Kept(f"s3://{BUCKET}/{prefix}", server.bucket / prefix, tmp_path / "data")


@pytest.fixture
def local(tmp_path: Path) -> Kept:
    return Kept(None, tmp_path / "data" / "checkpoints", tmp_path / "data")


@pytest.fixture(params=["local", "s3"])
def kept(request: pytest.FixtureRequest) -> Kept:
    kept: Kept = request.getfixturevalue(request.param)
    return kept


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


# --- what every store does --------------------------------------------------------------------------------------------


def test_what_was_published_is_read(kept: Kept) -> None:
    async def body() -> None:
        location = await kept.save("hello")
        assert await kept.read(location) == "hello"
        assert await kept.store.sizes(location) == {"inner/weights.safetensors": 5, "tinker.json": 2}
        async with kept.store.reading(location) as directory:
            assert kept.store.is_read(location)
            assert files_of(directory) == await kept.store.sizes(location)
        assert not kept.store.is_read(location)
        assert await kept.open_again().read(location) == "hello"

    run(body())


def test_saves_of_one_name_do_not_touch_each_other(kept: Kept) -> None:
    async def body() -> None:
        old, new = await kept.save("old"), await kept.save("new")
        assert (await kept.read(old), await kept.read(new)) == ("old", "new")
        await kept.store.remove(old)
        assert await kept.read(new) == "new"
        assert all(name.startswith(f"{new}/") for name in kept.files())
        with pytest.raises(StorageError, match=r"files .* are gone"):
            await kept.store.sizes(old)
        with pytest.raises(StorageError, match="files are gone"):
            await kept.open_again().read(old)
        await kept.store.remove(new)
        await kept.store.remove(new)
        assert kept.files() == []

    run(body())


def test_large_files_arrive_whole(kept: Kept) -> None:
    async def body() -> None:
        content = os.urandom(11 * 1024 * 1024 + 7)  # several parts
        location, directory = location_of(PATH, new_version()), await kept.store.begin()
        (directory / "large.safetensors").write_bytes(content)
        await kept.store.seal(directory, location)
        await kept.store.publish(directory, location)
        await kept.store.end(directory)
        async with kept.open_again().store.reading(location) as directory:
            assert (directory / "large.safetensors").read_bytes() == content

    run(body())


def test_unfinished_saves_are_cleared_up(kept: Kept) -> None:
    async def body() -> None:
        location, unfinished = await kept.save("kept"), await kept.store.begin()
        (unfinished / "half").write_text("x")
        again = kept.open_again()
        await again.store.open()
        assert not unfinished.exists()
        assert await again.read(location) == "kept"

    run(body())


@pytest.mark.parametrize("damage", ["flipped", "shorter", "missing", "added", "unsealed", "moved"])
def test_damaged_files_are_named_and_never_read(kept: Kept, damage: str) -> None:
    async def body() -> None:
        location = await kept.save("x" * 100)
        victim = f"{location}/inner/weights.safetensors"
        if damage == "flipped":
            kept.put(victim, b"y" + b"x" * 99)
        elif damage == "shorter":
            kept.put(victim, b"x" * 50)
        elif damage == "missing":
            kept.delete(victim)
        elif damage == "added":
            kept.put(f"{location}/more.safetensors", b"?")
        elif damage == "unsealed":
            kept.delete(f"{location}/seal.json")
        else:
            other = location_of(PATH, new_version())
            for name in kept.files():
                kept.put(name.replace(location, other), (kept.root / name).read_bytes())
            location = other
        names = {"added": "more.safetensors", "unsealed": "seal.json", "moved": ""}
        again = kept.open_again()
        with pytest.raises(DamagedRecordError, match=f"{location}.*{names.get(damage, 'inner/weights.safetensors')}"):
            await again.read(location)
        if damage in ("flipped", "shorter", "missing"):  # nothing of it is kept
            kept.put(victim, b"x" * 100)
            assert await again.read(location) == "x" * 100

    run(body())


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "code.py", "optimizer.pkl", "noext"])
def test_files_that_could_run_code_are_refused(kept: Kept, name: str) -> None:
    async def body() -> None:
        directory = await kept.store.begin()
        (directory / name).write_text("x")
        with pytest.raises(StorageError, match=name):
            await kept.store.seal(directory, location_of(PATH, new_version()))
        location = await kept.save("fine")
        kept.put(f"{location}/{name}", b"x")
        with pytest.raises((StorageError, DamagedRecordError), match=name):
            await kept.open_again().read(location)

    run(body())


def test_a_save_of_nothing_is_refused(kept: Kept) -> None:
    async def body() -> None:
        with pytest.raises(StorageError, match="nothing was written"):
            await kept.store.seal(await kept.store.begin(), location_of(PATH, new_version()))

    run(body())


def test_checkpoints_of_older_releases_are_read_and_removed(kept: Kept) -> None:
    async def body() -> None:
        for name, content in (("inner/weights.safetensors", b"old"), ("tinker.json", b"{}"), ("odd.pt", b"unread")):
            kept.put(f"{LEGACY}/{name}", content)
        assert LEGACY == "s1%3Atrain%3A0/weights/step-1"
        assert await kept.read(LEGACY) == "old"
        assert set(await kept.store.sizes(LEGACY)) == {"inner/weights.safetensors", "tinker.json"}
        new = await kept.save("new")
        await kept.store.remove(LEGACY)
        assert all(name.startswith(new) for name in kept.files())
        assert await kept.read(new) == "new"

    run(body())


def test_links_take_the_files_without_the_seal(kept: Kept) -> None:
    async def body() -> None:
        source, target = await kept.save("shared"), location_of(PATH, new_version())
        directory = await kept.store.begin()
        async with kept.store.reading(source) as files:
            await kept.store.link(files, directory)
            assert (directory / "inner" / "weights.safetensors").stat().st_nlink == 2
        await kept.store.seal(directory, target)
        await kept.store.publish(directory, target)
        await kept.store.end(directory)
        await kept.store.remove(source)
        assert await kept.read(target) == "shared"

    run(body())


def test_only_directories_made_by_begin_are_used(kept: Kept, tmp_path: Path) -> None:
    async def body() -> None:
        for call in (kept.store.end(tmp_path), kept.store.publish(tmp_path, "x"), kept.store.link(tmp_path, tmp_path)):
            with pytest.raises(ValueError, match="begin"):
                await call

    run(body())


# --- a local directory ------------------------------------------------------------------------------------------------


def test_a_replacement_that_an_older_release_did_not_finish_is_taken_back(local: Kept) -> None:
    async def body() -> None:
        old = local.root / ".replaced" / LEGACY
        old.mkdir(parents=True)
        (old / "tinker.json").write_text("{}")
        await local.store.open()
        assert local.files() == [f"{LEGACY}/tinker.json"]

    run(body())


def test_servers_that_share_a_directory_leave_each_others_saves_alone(tmp_path: Path) -> None:
    async def body() -> None:
        mine, others = (
            open_checkpoint_store(f"file://{tmp_path / 'shared'}", tmp_path, 0, name) for name in ("me", "other")
        )
        saving, location = await others.begin(), location_of(PATH, new_version())
        (saving / "a.safetensors").write_text("x")
        await mine.open()
        await others.seal(saving, location)
        await others.publish(saving, location)
        assert await mine.sizes(location) == {"a.safetensors": 1}

    run(body())


def test_what_the_file_system_refuses_is_a_storage_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = open_checkpoint_store(f"file://{tmp_path / 'file'}", tmp_path, 0, "me")
    with pytest.raises(StorageError, match="Not a directory") as caught:
        run(store.begin())  # type: ignore[arg-type]
    assert isinstance(caught.value.__cause__, OSError)


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_remote_files_are_fetched_once_and_removed_when_there_are_too_many(
    s3: Kept, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        first, second = await s3.save("a" * 600), await s3.save("b" * 600)
        monkeypatch.setitem(remote._RETRY, "retry_timeout", timedelta(milliseconds=100))
        kept = Kept(s3.url, s3.root, s3.data_dir, cache_bytes=1000)
        fetched = s3.data_dir / "cache" / "checkpoints" / "fetched"
        async with kept.store.reading(first) as directory:
            await kept.read(second)
            assert len(list(fetched.iterdir())) == 1  # the one that is being read stays, whatever its size
            assert (directory / "tinker.json").exists()
        server.stop()
        try:
            assert await kept.read(first) == "a" * 600
            with pytest.raises(StorageError):
                await kept.read(second)
        finally:
            server.start()
        assert await kept.read(second) == "b" * 600
        assert len(list(fetched.iterdir())) == 1

    run(body())


def test_readers_at_the_same_time_share_one_download(s3: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        location, names = await s3.save("x"), []
        real = remote.obstore.get_async

        async def get(store: Any, name: str) -> Any:
            names.append(name)
            return await real(store, name)

        monkeypatch.setattr(remote.obstore, "get_async", get)
        assert await asyncio.gather(*(s3.read(location) for _ in range(5))) == ["x"] * 5
        assert len(names) == len(set(names)) == 3

    run(body())


async def refuses(kept: Kept, match: str) -> None:
    with pytest.raises(StorageError, match=match):
        await kept.save("x")
    with pytest.raises(StorageError, match=match):
        await kept.store.remove("a/versions/b/c/d")
    with pytest.raises(StorageError, match=match):
        await kept.read("a/versions/b/c/d")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "403 Forbidden: SignatureDoesNotMatch.*check the credentials"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "403 Forbidden: InvalidAccessKeyId.*check the credentials"),
    ],
)
def test_wrong_credentials_are_said(
    s3: Kept, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], said: str
) -> None:
    async def body() -> None:
        location = await s3.save("before")
        for name, value in changes.items():
            monkeypatch.setenv(name, value)
        await refuses(s3.open_again(), said)
        assert await s3.read(location) == "before"

    run(body())


def test_a_missing_bucket_is_said(s3: Kept) -> None:
    async def body() -> None:
        with pytest.raises(StorageError, match=r"404 Not Found: NoSuchBucket.*create the bucket"):
            await Kept("s3://no-such-bucket/x", s3.root, s3.data_dir).save("x")

    run(body())


def test_a_store_that_is_gone_is_said_and_comes_back(
    s3: Kept, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        server.stop()
        try:
            monkeypatch.setitem(remote._RETRY, "retry_timeout", timedelta(milliseconds=100))
            await refuses(s3.open_again(), "check that the store can be reached")
        finally:
            server.start()
        assert await s3.read(await s3.save("again")) == "again"

    run(body())


def test_a_store_that_never_answers_is_given_up(s3: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(64)
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
            monkeypatch.setitem(remote._CLIENT, "read_timeout", timedelta(milliseconds=100))
            monkeypatch.setitem(remote._RETRY, "retry_timeout", timedelta(milliseconds=100))
            await refuses(s3.open_again(), "check that the store can be reached")

    run(body())


def test_a_lost_store_fails_a_save_within_half_a_minute() -> None:
    client: Any = remote._CLIENT
    retry: Any = remote._RETRY
    assert client["connect_timeout"] + client["read_timeout"] + retry["retry_timeout"] <= timedelta(seconds=30)


@pytest.mark.parametrize(
    "url", ["bucket/prefix", "ftp://x/y", "s3:bucket", "s3:///x", "memory:///", "file://host/x", "file:x", "https://x"]
)
def test_urls_that_are_no_store(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--checkpoint-store"):
        open_checkpoint_store(url, tmp_path, 0, "me")


# --- names ------------------------------------------------------------------------------------------------------------

NASTY = [
    "a:b",
    "a%3Ab",
    "a_b",
    "a/b",
    "..",
    ".",
    "",
    "a\0b",
    "é",
    "a b",
    "x" * 300,
    "x" * 301,
    ".incoming",
    "../../etc",
]


def test_directory_names_are_injective_and_safe() -> None:
    names = [safe_directory_name(model_id) for model_id in NASTY]
    assert len(set(names)) == len(NASTY)
    assert all(name and not name.startswith(".") and "/" not in name and len(name) <= 255 for name in names)


def test_no_model_id_leads_out_of_the_root(kept: Kept) -> None:
    async def body() -> None:
        for run_id in NASTY:
            location = await kept.save(run_id, TinkerPath(run_id=run_id, kind=CheckpointType.TRAINING, name="n"))
            assert await kept.read(location) == run_id
            assert (kept.root / location).resolve().is_relative_to(kept.root.resolve())

    run(body())


@pytest.mark.parametrize("name", ["..", "a/b", "/etc", ".hidden", "", "a\0"])
def test_names_that_are_no_path_segment_are_refused(name: str) -> None:
    path = TinkerPath(run_id="run", kind=CheckpointType.TRAINING, name=name)
    for version in (None, "v"):
        with pytest.raises(InvalidRequestError):
            location_of(path, version)
