from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import attrs
import pytest

from tinker_core.errors import (
    CheckpointExistsError,
    StorageError,
    UnknownCheckpointError,
    UnknownModelError,
    UnknownSessionError,
)
from tinker_core.storage import ControlStore, session_queries
from tinker_core.storage.tables import metadata
from tinker_core.types import (
    CheckpointRecord,
    LoraConfig,
    OptimizerConfig,
    SamplerRecord,
    SessionRecord,
    TinkerPath,
    TrainingRunRecord,
)

NOON = datetime(2026, 1, 2, 12, 0, 0, 123456, tzinfo=UTC)
LORA = LoraConfig(rank=8, seed=3, train_mlp=False, alpha=16.0, target_modules=("q_proj", "v_proj"))
OPTIMIZER = OptimizerConfig(type="adamw", settings={"momentum": 0.5})

SESSION = SessionRecord(
    session_id="s1",
    created_at=NOON,
    owner="ada",
    project_id="p1",
    tags=("a", "b"),
    user_metadata={"nested": {"list": [1, 2.5, None, True]}},
    sdk_version="0.38.0",
    display_name="a session",
)
RUN = TrainingRunRecord(
    model_id="s1:train:0",
    session_id="s1",
    base_model="tiny",
    lora_config=LORA,
    optimizer_config=OPTIMIZER,
    created_at=NOON,
    last_request_at=NOON,
    owner="ada",
    project_id="p1",
    user_metadata={"k": "v"},
)
CHECKPOINT = CheckpointRecord(
    path=TinkerPath.parse("tinker://s1:train:0/weights/step-1"),
    base_model="tiny",
    lora_config=LORA,
    optimizer_config=OPTIMIZER,
    created_at=NOON,
    size_bytes=2**40,
    request_id="r1",
    owner="ada",
    user_metadata=None,
    expires_at=NOON + timedelta(hours=1),
    public=True,
)
SAMPLER = SamplerRecord(
    sampling_session_id="s1:sample:0",
    session_id="s1",
    base_model="tiny",
    created_at=NOON,
    model_path="tinker://s1:train:0/sampler_weights/a",
    revision="rev",
    owner="ada",
)


def with_store(url: str, body: Callable[[ControlStore], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        store = await ControlStore.open(url)
        try:
            await body(store)
        finally:
            await store.close()

    asyncio.run(main())


@pytest.fixture
def url(database: str) -> str:
    return database


async def fill(store: ControlStore) -> None:
    await store.add_session(SESSION)
    await store.add_run(RUN)
    await store.put_checkpoint(CHECKPOINT, overwrite=False)
    await store.add_sampler(SAMPLER)


def test_records_come_back_equal_after_a_restart(url: str) -> None:
    async def read(store: ControlStore) -> None:
        assert await store.get_session("s1") == SESSION
        assert await store.get_run("s1:train:0") == RUN
        assert await store.get_checkpoint(CHECKPOINT.path) == CHECKPOINT
        assert await store.get_sampler("s1:sample:0") == SAMPLER

    with_store(url, fill)
    with_store(url, read)


def test_absent_records_are_none(url: str) -> None:
    async def read(store: ControlStore) -> None:
        assert await store.get_session("no") is None
        assert await store.get_run("no") is None
        assert await store.get_checkpoint(CHECKPOINT.path) is None
        assert await store.get_sampler("no") is None
        assert await store.list_run_ids("no") == []
        assert await store.list_sampler_ids("no") == []
        assert await store.list_checkpoints("no") == ([], 0)

    with_store(url, read)


def test_times_of_other_zones_are_kept_as_the_same_moment_in_utc(url: str) -> None:
    async def body(store: ControlStore) -> None:
        local = NOON.astimezone(timezone(timedelta(hours=5)))
        await store.add_session(attrs.evolve(SESSION, created_at=local))
        found = await store.get_session("s1")
        assert found is not None
        assert found.created_at == NOON
        assert found.created_at.tzinfo is UTC

    with_store(url, body)


def test_a_naive_time_is_refused(url: str) -> None:
    async def body(store: ControlStore) -> None:
        with pytest.raises(StorageError, match="no time zone"):
            await store.add_session(attrs.evolve(SESSION, created_at=NOON.replace(tzinfo=None)))

    with_store(url, body)


def test_lists_are_pages_of_one_owner_newest_first(url: str) -> None:
    async def body(store: ControlStore) -> None:
        for number in range(5):
            await store.add_session(attrs.evolve(SESSION, session_id=f"s{number}", created_at=NOON + timedelta(number)))
            await store.add_run(
                attrs.evolve(RUN, model_id=f"m{number}", project_id="even" if number % 2 == 0 else "odd")
            )
        await store.add_session(attrs.evolve(SESSION, session_id="other", owner="bob"))
        sessions, total = await store.list_sessions("ada", limit=2, offset=1)
        assert ([record.session_id for record in sessions], total) == (["s3", "s2"], 5)
        runs, total = await store.list_runs("ada", limit=3, offset=0)
        assert ([record.model_id for record in runs], total) == (["m4", "m3", "m2"], 5)
        runs, total = await store.list_runs("ada", limit=10, offset=0, project_id="odd")
        assert ([record.model_id for record in runs], total) == (["m3", "m1"], 2)
        assert await store.list_runs("bob", limit=10, offset=0) == ([], 0)
        assert await store.list_run_ids("s1") == ["m0", "m1", "m2", "m3", "m4"]

    with_store(url, body)


def test_finishing_a_session_twice_keeps_the_first_reason(url: str) -> None:
    async def body(store: ControlStore) -> None:
        await store.add_session(SESSION)
        await store.finish_session("s1", NOON, "completed", "fine")
        await store.finish_session("s1", NOON + timedelta(1), "failed", None)
        finished = attrs.evolve(SESSION, finished_at=NOON, finish_reason="completed", finish_detail="fine")
        assert await store.get_session("s1") == finished
        with pytest.raises(UnknownSessionError):
            await store.finish_session("no", NOON, None, None)

    with_store(url, body)


def test_touching_a_run_moves_its_last_request(url: str) -> None:
    async def body(store: ControlStore) -> None:
        await store.add_run(RUN)
        await store.touch_run(RUN.model_id, NOON + timedelta(1))
        assert await store.get_run(RUN.model_id) == attrs.evolve(RUN, last_request_at=NOON + timedelta(1))
        with pytest.raises(UnknownModelError):
            await store.touch_run("no", NOON)

    with_store(url, body)


def test_a_checkpoint_is_replaced_only_when_asked(url: str) -> None:
    async def body(store: ControlStore) -> None:
        await store.put_checkpoint(CHECKPOINT, overwrite=False)
        newer = attrs.evolve(CHECKPOINT, size_bytes=7, request_id="r2")
        with pytest.raises(CheckpointExistsError):
            await store.put_checkpoint(newer, overwrite=False)
        assert await store.get_checkpoint(CHECKPOINT.path) == CHECKPOINT
        await store.put_checkpoint(newer, overwrite=True)
        assert await store.list_checkpoints("ada") == ([newer], 1)

    with_store(url, body)


def test_checkpoints_of_one_run_can_be_listed_and_deleted(url: str) -> None:
    async def body(store: ControlStore) -> None:
        paths = [TinkerPath.parse(f"tinker://run-{number % 2}/weights/{number}") for number in range(4)]
        for path in paths:
            await store.put_checkpoint(attrs.evolve(CHECKPOINT, path=path), overwrite=False)
        found, total = await store.list_checkpoints("ada", run_id="run-1")
        assert ([record.path for record in found], total) == ([paths[3], paths[1]], 2)
        found, total = await store.list_checkpoints("ada", limit=1, offset=1)
        assert ([record.path for record in found], total) == ([paths[2]], 4)
        await store.delete_checkpoint(paths[3])
        assert await store.get_checkpoint(paths[3]) is None
        with pytest.raises(UnknownCheckpointError):
            await store.delete_checkpoint(paths[3])

    with_store(url, body)


def test_expired_checkpoints_are_those_whose_time_is_over(url: str) -> None:
    async def body(store: ControlStore) -> None:
        later, never = (TinkerPath.parse(f"tinker://run/weights/{name}") for name in ("later", "never"))
        await store.put_checkpoint(CHECKPOINT, overwrite=False)
        await store.put_checkpoint(attrs.evolve(CHECKPOINT, path=later, owner="bob"), overwrite=False)
        await store.put_checkpoint(attrs.evolve(CHECKPOINT, path=never), overwrite=False)
        await store.set_checkpoint_expiry(later, NOON + timedelta(days=1))
        await store.set_checkpoint_expiry(never, None)
        assert await store.list_expired_checkpoints(NOON) == []
        assert [record.path for record in await store.list_expired_checkpoints(NOON + timedelta(hours=1))] == [
            CHECKPOINT.path
        ]
        assert len(await store.list_expired_checkpoints(NOON + timedelta(days=1))) == 2
        with pytest.raises(UnknownCheckpointError):
            await store.set_checkpoint_expiry(TinkerPath.parse("tinker://run/weights/no"), None)

    with_store(url, body)


def test_sampler_ids_come_in_order_of_creation(url: str) -> None:
    async def body(store: ControlStore) -> None:
        for number in (10, 2):
            await store.add_sampler(attrs.evolve(SAMPLER, sampling_session_id=f"s1:sample:{number}"))
        assert await store.list_sampler_ids("s1") == ["s1:sample:10", "s1:sample:2"]

    with_store(url, body)


def test_the_same_id_twice_is_a_storage_error(url: str) -> None:
    async def body(store: ControlStore) -> None:
        await store.add_session(SESSION)
        with pytest.raises(StorageError, match=r"UNIQUE|unique"):
            await store.add_session(SESSION)

    with_store(url, body)


def test_every_table_has_owner_and_project() -> None:
    assert all({"owner", "project_id"} <= set(table.columns.keys()) for table in metadata.tables.values())


def test_a_search_goes_on_until_it_has_found_enough(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_queries, "_SCAN", 2)

    async def body(store: ControlStore) -> None:
        for number in range(7):
            at = NOON + timedelta(number // 3)  # several of one moment, also where a page ends
            await store.add_session(attrs.evolve(SESSION, session_id=f"s{number}", created_at=at))

        async def found(limit: int, after: tuple[datetime, str] | None = None) -> list[str]:
            records = await store.session_queries.search(
                "ada",
                lambda record: record.session_id != "s4",
                session_id=None,
                project_ids=None,
                after=after,
                limit=limit,
            )
            return [record.session_id for record in records]

        assert await found(10) == ["s6", "s5", "s3", "s2", "s1", "s0"]
        assert await found(3) == ["s6", "s5", "s3"]
        assert await found(10, (NOON, "s2")) == ["s1", "s0"]

    with_store(url, body)
