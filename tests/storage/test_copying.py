from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import attrs
import pytest

from tests.postgres import Postgres
from tests.storage.test_control_store import CHECKPOINT, NOON, RUN, SAMPLER, SESSION, fill, with_store
from tinker_core.engine.keyring import new_key
from tinker_core.storage import ControlStore
from tinker_core.types import AuditRecord, UsageKind, UsageRecord
from tinker_server.cli import main


@pytest.fixture
def filled(tmp_path: Path) -> str:
    async def all_kinds(store: ControlStore) -> None:
        await fill(store)
        for number in range(3):
            await store.keys.add(new_key("ann", f"key {number}", NOON)[1])
        await store.audit.add([AuditRecord(recorded_at=NOON, category="projects", event="x", owner="ada", details={})])
        usage = UsageRecord(
            kind=UsageKind.TRAINING, owner="ada", base_model="tiny", starts_at=NOON, ends_at=NOON, quantity=2**40
        )
        await store.usage.add([usage])

    url = f"sqlite:///{tmp_path / 'filled.sqlite'}"
    with_store(url, all_kinds)
    return url


def copy(source: str, target: str) -> int:
    return main(["database", "copy", "--from", source, "--to", target, "--format", "json"])


@pytest.mark.parametrize("kinds", ["sqlite to postgres", "postgres to sqlite"])
def test_a_copy_has_all_records_and_goes_on_where_they_end(
    filled: str, kinds: str, postgres: Postgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = postgres.database(migrated=False)
    assert copy(filled, target) == 0
    if kinds == "postgres to sqlite":
        source, target = target, f"sqlite:///{tmp_path / 'copy.sqlite'}"
        assert copy(source, target) == 0
        capsys.readouterr()
        assert copy(source, target) == 2
        assert "has records already" in capsys.readouterr().err
    else:
        copied = {row["table"]: row["records"] for row in json.loads(capsys.readouterr().out)}
        assert (copied["sessions"], copied["api_keys"], copied["access_tokens"]) == (1, 3, 0)

    async def check(store: ControlStore) -> None:
        assert await store.get_session("s1") == SESSION
        assert await store.get_run(RUN.model_id) == RUN
        assert await store.get_checkpoint(CHECKPOINT.path) == CHECKPOINT
        assert await store.get_sampler(SAMPLER.sampling_session_id) == SAMPLER
        assert [key.name for key in await store.keys.list()] == ["key 0", "key 1", "key 2"]
        _, another = new_key("ann", "key 3", NOON)
        await store.keys.add(another)
        assert await store.keys.number_of(another.key_id) == 4
        assert len(await store.audit.list("ada", NOON, NOON + timedelta(1))) == 1
        await store.add_session(attrs.evolve(SESSION, session_id="s2"))

    with_store(target, check)


def test_what_cannot_be_copied_is_named(
    filled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], postgres: Postgres
) -> None:
    missing = tmp_path / "missing.sqlite"
    assert copy(f"sqlite:///{missing}", postgres.database()) == 2
    assert "there are no control records" in capsys.readouterr().err
    assert not missing.exists()
    assert copy(filled, "postgresql://ada:s3cr3t@/name?host=/no/such/directory") == 2
    said = capsys.readouterr().err
    assert "cannot be opened" in said
    assert "s3cr3t" not in said
