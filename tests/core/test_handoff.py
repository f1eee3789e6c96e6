"""The place in memory where weights lie on their way to a sampler beside the workers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tinker_core.engine import EngineConfig
from tinker_core.engine.handoff import Handoff
from tinker_core.errors import ConfigurationError
from tinker_core.types import BaseModelSpec


def new(tmp_path: Path, **settings: Any) -> Handoff:
    data_dir, memory = tmp_path / "data", tmp_path / "memory"
    memory.mkdir(exist_ok=True)
    spec = BaseModelSpec(name="tiny/model", path="tiny")
    values = {"handoff_dir": memory, **settings}
    config = EngineConfig(base_models=(spec,), data_dir=data_dir, backend="fake", sampler="fake", **values)
    return Handoff(config, spec.name)


def test_what_nobody_took_is_removed_and_what_somebody_took_stays(tmp_path: Path) -> None:
    async def body() -> None:
        handoff = new(tmp_path)
        handoff.clear()
        async with handoff.incoming() as left:
            (left / "weights").write_text("1")
        async with handoff.incoming() as taken:
            (taken / "weights").write_text("2")
            handoff.held.mkdir()
            taken.rename(handoff.held / "revision")
        assert not left.exists()
        assert (handoff.held / "revision" / "weights").read_text() == "2"

    asyncio.run(body())


def test_a_new_server_finds_nothing_of_the_one_before(tmp_path: Path) -> None:
    before = new(tmp_path)
    before.clear()
    before.held.mkdir(parents=True)
    after = new(tmp_path)
    assert after.held == before.held
    after.clear()
    assert not after.held.exists()


def test_servers_with_other_data_have_other_places(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    memory = tmp_path / "memory"
    assert new(tmp_path).held != new(tmp_path / "other", handoff_dir=memory).held


def test_a_place_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    handoff = new(tmp_path)
    handoff.clear()
    [own] = (tmp_path / "memory").iterdir()
    own.chmod(0o755)
    with pytest.raises(ConfigurationError, match="not this user's alone"):
        handoff.clear()
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(ConfigurationError, match="not this user's alone"):
        handoff.clear()


def test_a_missing_directory_is_named_with_the_flag(tmp_path: Path) -> None:
    handoff = new(tmp_path, handoff_dir=tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=r"nowhere.*--handoff-dir"):
        handoff.clear()
