"""Hostile requests to every route: no 500, no hang, and an engine that works as before.

``HOSTILE_EXAMPLES=400`` in the environment sends many more; `tests.fuzz` goes on for as long as one likes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.conftest import SECRET, Target
from tests.hostile.examples import PARAMETERS, Endpoint, endpoints
from tests.hostile.strategies import calls
from tinker_core.engine import Engine, EngineConfig
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import BaseModelSpec
from tinker_server.app import create_app

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "12"))


def routes() -> list[Endpoint]:
    """The routes of an app that is never started."""
    plugins = Plugins.load("core", FAKE_PLUGIN)
    spec = BaseModelSpec(name="tiny", path="tiny")
    config = EngineConfig(base_models=(spec,), data_dir=Path("unused"), backend="fake", sampler="fake", plugins=())
    return endpoints(create_app(Engine(config, plugins), plugins=plugins))


@pytest.mark.parametrize("endpoint", routes(), ids=str)
def test_no_request_breaks_the_server(target: Target, endpoint: Endpoint) -> None:
    """A new route needs an example in `tests.hostile.examples`, or this fails."""
    assert set(endpoint.parameters) <= PARAMETERS.keys(), f"{endpoint}: give its path parameters good values"

    @settings(max_examples=EXAMPLES)
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        answer = target.hosted.send(data.draw(calls(endpoint, target.ids)))
        assert SECRET.encode() not in answer.body
        target.follow(answer)

    attack()


def test_the_engine_works_after_all_that(target: Target) -> None:
    target.probe()
    assert target.files_outside() == {"data", "canary.txt"}
    assert (target.root / "canary.txt").read_text() == SECRET
