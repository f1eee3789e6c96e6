"""Saved weights in the engine: who may read them, how long they live, how they are copied and released."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.core.conftest import Client, EngineFactory, ManualClock, forward_backward, optim_step
from tinker_core.engine import CopyWeightsInput, NewSession
from tinker_core.engine.access import issue_token, revoke_token
from tinker_core.errors import (
    InvalidRequestError,
    StorageError,
    UnknownAccessTokenError,
    UnknownCheckpointError,
    UnknownModelError,
)
from tinker_core.storage import ControlStore, database_url
from tinker_core.storage.sealed import SEAL_FILE
from tinker_core.types import (
    LOCAL_CALLER,
    Caller,
    CheckpointRecord,
    CheckpointType,
    LoadWeightsInput,
    LoadWeightsOutput,
    RequestError,
    SaveWeightsExternalInput,
    SaveWeightsForSamplerInput,
    SaveWeightsInput,
    SaveWeightsOutput,
    SessionSearch,
    StatusQuery,
    UnloadModelInput,
    UnloadModelOutput,
)

MINE = LOCAL_CALLER.owner
EVE = Caller(owner="eve")


async def save(client: Client, model_id: str, seq_id: int = 1, name: str = "step", **fields: Any) -> str:
    output = await client.run(SaveWeightsInput(model_id=model_id, seq_id=seq_id, path=name, **fields))
    assert isinstance(output, SaveWeightsOutput), output
    assert output.path is not None
    return output.path


async def listed(client: Client, owner: str = MINE) -> list[str]:
    records, total = await client.engine.library.checkpoints(owner, None, 0)
    assert total == len(records)
    return [str(record.path) for record in records]


def files_below(data_dir: Path) -> list[Path]:
    """What checkpoints consist of, without their seals."""
    return [path for path in (data_dir / "checkpoints").rglob("*") if path.is_file() and path.name != SEAL_FILE]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Let the engine's own tasks run until something has happened."""
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(FileNotFoundError):  # what is counted is being removed
                if await condition():
                    return
            await asyncio.to_thread(lambda: None)


# --- lifetime ---------------------------------------------------------------------------------------------------------


def test_checkpoints_go_when_their_time_is_over(open_engine: EngineFactory, tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        async with open_engine(clock=clock) as client:
            model_id = await client.create()
            long = await save(client, model_id, 1, "long", ttl_seconds=7200)
            await save(client, model_id, 2, "short", ttl_seconds=3600)
            kept = await save(client, model_id, 3, "kept")
            await clock.advance(3600)
            assert await listed(client) == [kept, long]  # at once, whatever the task that removes files is doing
            await until(lambda: _is(not any("short" in str(file) for file in files_below(tmp_path / "data"))))
            await client.engine.library.set_ttl(kept, 3600, LOCAL_CALLER)
            await client.engine.library.set_ttl(long, None, LOCAL_CALLER)
            await clock.advance(3600)
            assert await listed(client) == [long]
            await until(lambda: _is(client.engine.library.stored_bytes(MINE) == _size(tmp_path / "data")))
            for ttl in (3599, 10 * 365 * 24 * 3600 + 1):
                with pytest.raises(InvalidRequestError, match="ttl_seconds"):
                    await client.engine.library.set_ttl(long, ttl, LOCAL_CALLER)

    asyncio.run(body())


async def _is(value: bool) -> bool:
    return value


def _size(data_dir: Path) -> int:
    size = 0
    for file in files_below(data_dir):
        with contextlib.suppress(FileNotFoundError):  # it is being removed
            size += file.stat().st_size
    return size


def test_what_expired_while_no_server_ran_goes_at_the_next_start(open_engine: EngineFactory, tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        async with open_engine(clock=clock) as client:
            await save(client, await client.create(), ttl_seconds=3600)
        await clock.advance(3600)
        async with open_engine(clock=clock) as client:
            assert await listed(client) == []
            await until(lambda: _is(client.engine.library.stored_bytes(MINE) == 0))
            await until(lambda: _is(files_below(tmp_path / "data") == []))

    asyncio.run(body())


def test_stored_bytes_follow_every_change(open_engine: EngineFactory, tmp_path: Path) -> None:
    async def body() -> None:
        async with open_engine() as client:
            library = client.engine.library
            model_id = await client.create()
            path = await save(client, model_id, 1)
            assert library.stored_bytes(MINE) == _size(tmp_path / "data") > 0
            await client.run(forward_backward(model_id, 2))
            await client.run(optim_step(model_id, 3))
            await save(client, model_id, 4, overwrite=True)
            await until(lambda: _is(library.stored_bytes(MINE) == _size(tmp_path / "data") > 0))
            await library.delete(path, LOCAL_CALLER)
            assert library.stored_bytes(MINE) == 0
            await until(lambda: _is(_size(tmp_path / "data") == 0))

    asyncio.run(body())


# --- who may read -----------------------------------------------------------------------------------------------------


@attrs.frozen
class Guest:
    """Another owner, with a session of their own."""

    client: Client
    session_id: str

    async def load(self, path: str, model_seq_id: int = 0, token: str | None = None) -> Any:
        request = LoadWeightsInput(
            path=path,
            optimizer=False,
            session_id=self.session_id,
            model_seq_id=model_seq_id,
            weights_access_token=token,
        )
        accepted = await self.client.engine.submit(request, EVE)
        return await self.client.engine.retrieve(accepted.request_id, 60.0, EVE.owner)

    async def copy(self, path: str, **fields: Any) -> CheckpointRecord:
        request = CopyWeightsInput(source_path=path, destination_project_id="archive", **fields)
        return await self.client.engine.library.copy(request, EVE)


async def invite(client: Client) -> Guest:
    return Guest(client, (await client.engine.create_session(NewSession(owner=EVE.owner))).session_id)


def test_a_public_checkpoint_can_be_read_by_all_and_changed_by_its_owner(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            library, model_id = client.engine.library, await client.create()
            path, private = await save(client, model_id, 1), await save(client, model_id, 2, "private")
            guest = await invite(client)
            refused = await guest.load(path)
            assert isinstance(refused, RequestError)
            assert refused.code == "UnknownCheckpointError"
            for _ in range(2):  # publishing twice is fine
                await library.set_public(path, True, LOCAL_CALLER)
            assert isinstance(await guest.load(path, 1), LoadWeightsOutput)
            assert str((await guest.copy(path)).path.name) == "step"
            run, seen = await library.run(model_id, EVE.owner)
            assert (run.model_id, [str(item.path) for item in seen]) == (model_id, [path])
            assert (await library.accessible_runs(EVE.owner, 10, 0, None))[1] == 3  # its own two, and the public one
            for change in (
                library.delete(path, EVE),
                library.set_ttl(path, 3600, EVE),
                library.set_public(path, False, EVE),
                library.files(private, EVE, "archive"),
            ):
                with pytest.raises(UnknownCheckpointError):
                    await change
            await library.set_public(path, False, LOCAL_CALLER)
            assert isinstance(await guest.load(path, 2), RequestError)
            with pytest.raises(UnknownModelError):
                await library.run(model_id, EVE.owner)

    asyncio.run(body())


def test_a_token_opens_exactly_what_it_names_until_it_ends(open_engine: EngineFactory, tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        async with open_engine(clock=clock) as client:
            first, second = await client.create(0), await client.create(1)
            path, other = await save(client, first, 1), await save(client, first, 2, "other")
            foreign = await save(client, second, 1)
            control = await ControlStore.open(database_url(tmp_path / "data"))
            day = timedelta(days=1)
            one = await issue_token(control, path, expires_in=day, now=clock.now())
            run = await issue_token(control, f"tinker://{first}", expires_in=None, now=clock.now())
            guest = await invite(client)
            opened = {
                (name, target): isinstance(await guest.load(target, number, token), LoadWeightsOutput)
                for number, (name, token, target) in enumerate(
                    (name, token, target)
                    for name, token in (("one", one.token), ("run", run.token), ("wrong", "tml-access-x"))
                    for target in (path, other, foreign)
                )
            }
            assert {key for key, value in opened.items() if value} == {("one", path), ("run", path), ("run", other)}
            assert str((await guest.copy(path, weights_access_token=one.token)).path.kind) == "weights"
            with pytest.raises(UnknownCheckpointError):
                await client.engine.library.set_ttl(path, 3600, EVE)
            await clock.advance(day.total_seconds())
            await revoke_token(control, run.record.token_id, now=clock.now())
            for number, token in enumerate((one.token, run.token)):
                assert isinstance(await guest.load(path, 100 + number, token), RequestError)
            for missing in ("tinker://nobody", f"tinker://{first}/weights/missing"):
                with pytest.raises((UnknownModelError, UnknownCheckpointError)):
                    await issue_token(control, missing, expires_in=None, now=clock.now())
            with pytest.raises(UnknownAccessTokenError):
                await revoke_token(control, "at-missing", now=clock.now())
            stored = await control.access_tokens.list()
            assert all(token.token not in repr(stored) for token in (one, run))
            await control.close()

    asyncio.run(body())


def test_the_audit_log_of_an_owner_tells_what_happened_to_their_weights(open_engine: EngineFactory) -> None:
    async def body() -> None:
        clock = ManualClock()
        async with open_engine(clock=clock) as client:
            library, start = client.engine.library, clock.now()
            path = await save(client, await client.create())
            await library.set_public(path, True, LOCAL_CALLER)
            await (await invite(client)).copy(path)
            await library.set_ttl(path, 3600, LOCAL_CALLER)
            await clock.advance(3600)
            await until(lambda: _is(client.engine.library.stored_bytes(MINE) == 0))
            audit = client.engine.accounts.audit
            mine, theirs = [
                await audit.entries(owner, start, clock.now() + timedelta(1)) for owner in (MINE, EVE.owner)
            ]
            events = ["saved", "published", "read", "ttl_set", "expired"]
            assert [entry.event for entry in mine] == [f"checkpoint_{event}" for event in events]
            assert {entry.details["tinker_path"] for entry in mine} == {path}
            assert [entry.event for entry in theirs] == ["checkpoint_saved", "checkpoint_copied"]

    asyncio.run(body())


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_is_made_once_and_outlives_its_source(open_engine: EngineFactory, tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        async with open_engine(clock=clock) as client:
            library, model_id = client.engine.library, await client.create()
            path = await save(client, model_id, 1, user_metadata={"step": "1"}, ttl_seconds=3600)
            request = CopyWeightsInput(
                source_path=path, destination_project_id="p", idempotency_key="k", ttl_seconds=7200
            )
            together = await asyncio.gather(*(library.copy(request, LOCAL_CALLER) for _ in range(3)))
            copy = together[0]
            assert {str(again.path) for again in together} == {str(copy.path)} != {path}
            assert (copy.project_id, copy.user_metadata, copy.path.name) == ("p", {"step": "1"}, "step")
            links = {file.stat().st_nlink for file in files_below(tmp_path / "data")}
            assert links == {2}  # no bytes are duplicated
            await clock.advance(3600)
            assert await listed(client) == [str(copy.path)]
            loaded = await client.run(
                LoadWeightsInput(path=str(copy.path), optimizer=True, session_id=client.session_id, model_seq_id=1)
            )
            assert isinstance(loaded, LoadWeightsOutput)
            refused = await client.run(forward_backward(copy.path.run_id, 1))
            assert isinstance(refused, RequestError)
            assert refused.code == "UnknownModelError"
        async with open_engine(clock=clock) as again:
            assert (await again.engine.library.copy(request, LOCAL_CALLER)).path == copy.path

    asyncio.run(body())


def test_copies_of_old_clients_go_into_a_free_run_of_their_session(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            library, model_id = client.engine.library, await client.create()
            path = await save(client, model_id)
            place = {"session_id": client.session_id, "model_seq_id": 5}
            copy = await library.copy(CopyWeightsInput(source_path=path, **place), LOCAL_CALLER)  # type: ignore[arg-type]
            assert copy.path.run_id == f"{client.session_id}:train:5"
            for taken in (0, 5):
                wanted = CopyWeightsInput(source_path=path, session_id=client.session_id, model_seq_id=taken)
                with pytest.raises(InvalidRequestError, match="in use"):
                    await library.copy(wanted, LOCAL_CALLER)
            refused = await client.run(client.create_input(5))
            assert isinstance(refused, RequestError)
            assert refused.category == "user"
            for wrong in ({}, {**place, "destination_project_id": "p"}, {"session_id": client.session_id}):
                with pytest.raises(InvalidRequestError):
                    CopyWeightsInput(source_path=path, **wrong)

    asyncio.run(body())


def test_external_weights_are_neither_copied_nor_loaded(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create()
            output: Any = await client.run(SaveWeightsExternalInput(model_id=model_id, seq_id=1, path="out"))
            request = CopyWeightsInput(source_path=output.path, destination_project_id="p")
            with pytest.raises(InvalidRequestError, match="external"):
                await client.engine.library.copy(request, LOCAL_CALLER)
            loaded = await client.run(LoadWeightsInput(path=output.path, optimizer=False, model_id=model_id, seq_id=2))
            assert isinstance(loaded, RequestError)
            assert "external" in loaded.message

    asyncio.run(body())


def test_a_copy_that_a_crash_interrupted_is_completed_when_it_is_asked_for_again(
    open_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with open_engine() as client:
            library = client.engine.library
            path = await save(client, await client.create())
            request = CopyWeightsInput(source_path=path, destination_project_id="p", idempotency_key="k")

            async def crash(*_: object) -> None:
                raise StorageError("the process ended here")

            with monkeypatch.context() as dying:
                dying.setattr(client.engine._registry, "add_session", crash)
                with pytest.raises(StorageError, match="ended here"):
                    await library.copy(request, LOCAL_CALLER)
            copy = await library.copy(request, LOCAL_CALLER)
            run, found = await library.run(copy.path.run_id, MINE)
            assert (run.project_id, found) == ("p", [copy])
            assert (await client.engine.session(run.session_id, MINE)).finished_at is not None
            await library.delete(str(copy.path), LOCAL_CALLER)
            with pytest.raises(UnknownCheckpointError):  # it was made; what became of it is known
                await library.copy(request, LOCAL_CALLER)

    asyncio.run(body())


def test_a_sampler_checkpoint_keeps_its_kind_when_copied(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            save_request = SaveWeightsForSamplerInput(model_id=await client.create(), seq_id=1, path="final")
            output: Any = await client.run(save_request)
            request = CopyWeightsInput(source_path=output.path, destination_project_id="p")
            copy = await client.engine.library.copy(request, LOCAL_CALLER)
            assert copy.path.kind is CheckpointType.SAMPLER

    asyncio.run(body())


# --- models and sessions ----------------------------------------------------------------------------------------------


def test_unloading_waits_for_accepted_work_and_frees_the_place(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine(max_models=1) as client:
            model_id = await client.create()
            passed = await client.engine.submit(forward_backward(model_id, 1), LOCAL_CALLER)
            unload = UnloadModelInput(model_id=model_id)
            receipts = [await client.engine.submit(unload, LOCAL_CALLER) for _ in range(2)]
            assert receipts[0] == receipts[1]
            assert await client.result(receipts[0].request_id) == UnloadModelOutput(model_id=model_id)
            assert not isinstance(await client.result(passed.request_id), RequestError)
            assert isinstance(await client.run(forward_backward(model_id, 2)), RequestError)
            assert await client.create(1)
            assert isinstance(await client.run(UnloadModelInput(model_id="nobody:train:0")), RequestError)

    asyncio.run(body())


def test_searching_sessions(open_engine: EngineFactory) -> None:
    async def body() -> None:
        clock = ManualClock()
        async with open_engine(clock=clock) as client:
            engine = client.engine
            made = {}
            for name, project in (("Grüne Äpfel", "fruit"), ("red apples", "fruit"), ("pears", None)):
                await clock.advance(1)
                session = NewSession(display_name=name, project_id=project, user_metadata={"kind": name, "n": 1})
                made[name] = (await engine.create_session(session)).session_id
            await engine.create_session(NewSession(owner=EVE.owner, display_name="red apples"))
            await engine.finish_session(made["pears"], "errored", "out of juice", MINE)

            async def find(**conditions: Any) -> list[str | None]:
                found, _ = await engine.catalogue.search(MINE, SessionSearch(**conditions))
                return [summary.session.display_name for summary in found]

            assert await find(display_name="APPLES") == ["red apples"]
            assert await find(display_name="äPFEL grüne") == ["Grüne Äpfel"]
            assert await find(display_name="red", session_id=made["pears"]) == ["pears", "red apples"]
            assert await find(session_id=made["pears"]) == ["pears"]
            assert await find(project_ids=("fruit",)) == ["red apples", "Grüne Äpfel"]
            assert await find(user_metadata={"kind": "pears", "n": "1"}) == ["pears"]
            assert await find(user_metadata={"kind": 'pe"ars'}) == []
            finished = StatusQuery(status="client_finished", reasons=("errored",))
            assert await find(statuses=(finished,)) == ["pears"]
            assert await find(statuses=(StatusQuery(status="client_finished", reasons=("success",)),)) == []
            assert await find(statuses=(StatusQuery(status="active"),), project_ids=("fruit",)) == await find(
                project_ids=("fruit",)
            )
            await clock.advance(600)
            assert await find(statuses=(StatusQuery(status="active"),)) == []
            pages, after = [], None
            while True:
                found, more = await engine.catalogue.search(MINE, SessionSearch(limit=1, after=after))
                pages += [summary.session.session_id for summary in found]
                after = (found[-1].session.created_at, found[-1].session.session_id)
                if not more:
                    break
            assert pages == [made["pears"], made["red apples"], made["Grüne Äpfel"], client.session_id]

    asyncio.run(body())


def test_a_session_moves_into_a_project_with_all_that_it_has(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            engine = client.engine
            model_id = await client.create()
            path = await save(client, model_id)
            await engine.catalogue.assign_project(client.session_id, "new", LOCAL_CALLER)
            assert (await engine.training_runs(MINE, 10, 0, "new"))[1] == 1
            later = await save(client, model_id, 2, "later")
            assert [(await engine.library.checkpoint(each, MINE)).project_id for each in (path, later)] == ["new"] * 2
            (summary,), _ = await engine.catalogue.search(MINE, SessionSearch(project_ids=("new",)))
            stored = engine.library.stored_bytes(MINE)
            assert (summary.checkpoints_count, summary.checkpoint_storage_bytes) == (2, stored)

    asyncio.run(body())
