"""Saves while storage fails: they say why, training goes on, nothing is corrupted, and later saves work."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
import sqlalchemy as sa
from alembic import command

from tests.core.conftest import Client, EngineFactory, forward_backward, optim_step
from tests.object_store import BUCKET, S3Server, serve_s3
from tinker_core.engine import CopyWeightsInput
from tinker_core.errors import DamagedRecordError
from tinker_core.storage import database_url, remote_checkpoints
from tinker_core.storage.schema import CONTROL
from tinker_core.storage.sealed import SEAL_FILE
from tinker_core.types import (
    LOCAL_CALLER,
    LoadWeightsInput,
    LoadWeightsOutput,
    RequestError,
    SaveWeightsInput,
    SaveWeightsOutput,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(remote_checkpoints._RETRY, "retry_timeout", timedelta(milliseconds=200))
    return f"s3://{BUCKET}/{tmp_path.name}"


async def save(client: Client, model_id: str, seq_id: int, name: str = "x") -> Any:
    return await client.run(SaveWeightsInput(model_id=model_id, seq_id=seq_id, path=name, overwrite=True))


async def load(client: Client, path: str, model_seq_id: int) -> Any:
    request = LoadWeightsInput(path=path, optimizer=True, session_id=client.session_id, model_seq_id=model_seq_id)
    return await client.run(request)


async def fails_and_recovers(client: Client, begin: Callable[[], None], end: Callable[[], None], said: str) -> None:
    """A save while storage fails between two that work; training before, between and after."""
    model_id = await client.create()
    before = await save(client, model_id, 1)
    assert isinstance(before, SaveWeightsOutput), before
    begin()
    try:
        assert not isinstance(await client.run(forward_backward(model_id, 2)), RequestError)
        failed = await save(client, model_id, 3)
        assert isinstance(failed, RequestError)
        assert said in failed.message, failed
        assert not isinstance(await client.run(optim_step(model_id, 4)), RequestError)
    finally:
        end()
    assert isinstance(await load(client, before.path, 1), LoadWeightsOutput)  # the old one, whole
    assert isinstance(await save(client, model_id, 5), SaveWeightsOutput)
    assert isinstance(await load(client, before.path, 2), LoadWeightsOutput)


# --- a local disk -----------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """A file system of 256 KiB; skips the test where none can be made."""
    directory.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"this user may not mount a small file system: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk(open_engine: EngineFactory, tmp_path: Path) -> None:
    disk = tmp_path / "data" / "checkpoints"
    filler = disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(b"x" * 512):
                    pass
            except OSError:
                os.fsync(file.fileno())

    async def body() -> None:
        async with open_engine() as client:
            await fails_and_recovers(client, fill, filler.unlink, "No space left on device")

    with small_disk(disk):
        asyncio.run(body())


def test_a_disk_that_became_read_only(open_engine: EngineFactory, tmp_path: Path) -> None:
    disk = tmp_path / "data" / "checkpoints"

    def remount(mode: str) -> Callable[[], None]:
        return lambda: subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True) and None

    async def body() -> None:
        async with open_engine() as client:
            await fails_and_recovers(client, remount("ro"), remount("rw"), "Read-only file system")

    with small_disk(disk):
        asyncio.run(body())


def test_damage_is_named_and_nothing_of_it_is_loaded(open_engine: EngineFactory, tmp_path: Path) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            good = await save(client, model_id, 1, "good")
            bad = await save(client, model_id, 2, "bad")
            (victim,) = (tmp_path / "data" / "checkpoints").glob("*/versions/weights/bad/*/weights.npz")
            victim.write_bytes(victim.read_bytes()[:-1] + b"?")
            refused = await load(client, bad.path, 1)
            assert isinstance(refused, RequestError)
            assert "weights.npz is damaged" in refused.message
            into = await client.run(LoadWeightsInput(path=bad.path, optimizer=True, model_id=model_id, seq_id=3))
            assert isinstance(into, RequestError)
            copying = CopyWeightsInput(source_path=bad.path, destination_project_id="p")
            with pytest.raises(DamagedRecordError, match=r"weights\.npz is damaged"):
                await client.engine.library.copy(copying, LOCAL_CALLER)
            assert not isinstance(await client.run(forward_backward(model_id, 4)), RequestError)
            assert isinstance(await load(client, good.path, 2), LoadWeightsOutput)

    asyncio.run(body())


# --- a bucket ---------------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_gone(open_engine: EngineFactory, server: S3Server, bucket: str) -> None:
    async def body() -> None:
        async with open_engine(checkpoint_store=bucket) as client:
            await fails_and_recovers(client, server.stop, server.start, "check that the store can be reached")

    asyncio.run(body())


def test_credentials_that_are_wrong(
    open_engine: EngineFactory, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        with monkeypatch.context() as wrong:
            wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
            async with open_engine(checkpoint_store=bucket) as client:
                model_id = await client.create()
                failed = await save(client, model_id, 1)
                assert isinstance(failed, RequestError)
                assert "403 Forbidden: SignatureDoesNotMatch" in failed.message
                assert "check the credentials" in failed.message
                assert not isinstance(await client.run(forward_backward(model_id, 2)), RequestError)
        shutil.rmtree(tmp_path / "data")
        async with open_engine(checkpoint_store=bucket) as client:
            assert isinstance(await save(client, await client.create(), 1), SaveWeightsOutput)

    asyncio.run(body())


# --- an older release -------------------------------------------------------------------------------------------------


@attrs.define
class OldRelease:
    """Turns a data directory into what the release before versions would have left."""

    data_dir: Path

    def write(self) -> None:
        for found in list(self.data_dir.iterdir()):
            if found.is_dir() and found.name != "checkpoints":
                shutil.rmtree(found)
            elif found.is_file() and found.name not in ("control.sqlite", "secret"):
                found.unlink()
        for files in list((self.data_dir / "checkpoints").glob("*/versions/*/*/*")):
            (files / SEAL_FILE).unlink()
            run, kind, name = files.parents[3], files.parents[1].name, files.parents[0].name
            (run / kind).mkdir(exist_ok=True)
            files.rename(run / kind / name)
        for leftover in list((self.data_dir / "checkpoints").glob("*/versions")):
            shutil.rmtree(leftover)
        engine = sa.create_engine(database_url(self.data_dir))
        with engine.begin() as connection:
            command.downgrade(CONTROL.alembic_config(connection), "0004")
        engine.dispose()


def test_checkpoints_of_an_older_release_stay_usable(open_engine: EngineFactory, tmp_path: Path) -> None:
    root = tmp_path / "data" / "checkpoints"

    async def write() -> tuple[str, ...]:
        async with open_engine() as client:
            model_id = await client.create()
            return tuple([(await save(client, model_id, seq_id, f"n{seq_id}")).path for seq_id in (1, 2)])

    async def use(kept: str, other: str) -> None:
        async with open_engine() as client:
            library = client.engine.library
            assert isinstance(await load(client, kept, 0), LoadWeightsOutput)
            sizes = (await library.files(kept, LOCAL_CALLER, "test")).sizes
            assert set(sizes) == {"tinker.json", "weights.npz", "optimizer.npz"}
            copy = await library.copy(CopyWeightsInput(source_path=kept, destination_project_id="p"), LOCAL_CALLER)
            await library.delete(kept, LOCAL_CALLER)
            assert isinstance(await load(client, str(copy.path), 1), LoadWeightsOutput)
            assert isinstance(await load(client, other, 2), LoadWeightsOutput)
            async with asyncio.timeout(120):
                while list(root.glob("*/weights/n1")):
                    await asyncio.to_thread(lambda: None)
            assert len(list(root.glob("*/weights/n2/tinker.json"))) == 1

    kept, other = asyncio.run(write())
    OldRelease(tmp_path / "data").write()
    assert len(list(root.glob("*/weights/*/tinker.json"))) == 2
    asyncio.run(use(kept, other))
