"""The pages about HTTP and metrics name what is served, all of it and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.routing import Route

from tinker_core.engine.counters import Counters
from tinker_core.plugins import Plugins
from tinker_core.types import DurabilityMetrics
from tinker_server.app import create_app
from tinker_server.client_flags import ClientFlags
from tinker_server.life import ServerLife
from tinker_server.metric_families import FAMILIES
from tinker_server.metrics import Metrics
from tinker_server.services import PollGate

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGE = (REFERENCE / "http-api.md").read_text()
CATCH_ALL = "/api/v1/{path:path}"


def test_every_endpoint_is_in_the_table_and_every_row_is_served() -> None:
    nothing: Any = object()
    app = create_app(nothing, plugins=Plugins.load("core"))
    routes = [route for route in app.routes if isinstance(route, Route) and route.path != CATCH_ALL]
    served = {f"{method} {route.path}" for route in routes for method in (route.methods or set()) - {"HEAD"}}
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    written = {name for cell in cells for name in re.findall(r"`((?:GET|POST|PUT|DELETE) [^`]+)`", cell)}
    assert written == served


def test_every_row_says_who_calls_it() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if re.match(r"\| `(GET|POST|PUT|DELETE) ", line)]
    assert all(len(row) == 3 and all(cell.strip() for cell in row) for row in rows)


@pytest.mark.parametrize("flag", sorted(ClientFlags(retrieve_futures=True, compress_uploads=True).config("0.22.0")))
def test_everything_that_clients_are_told_is_explained(flag: str) -> None:
    assert f"| `{flag}` |" in PAGE


def test_the_families_are_what_is_served() -> None:
    idle: Any = SimpleNamespace(metrics=lambda: (), durability=DurabilityMetrics, counters=Counters())
    families = Metrics(idle, PollGate(), ServerLife()).registry.collect()
    served = {(family.name, family.type) for family in families if not family.name.startswith("process_")}
    assert served == {(family.name, family.kind) for family in FAMILIES}
