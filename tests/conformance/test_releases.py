"""The SDK releases where the wire changed most, all against one real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.matrix import Run, Verdicts, failures, read_results, run_clients, serve
from tests.conformance.releases import SMOKE


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Verdicts]]:
    runs = [Run(release) for release in SMOKE]
    with serve(tmp_path_factory.mktemp("conformance"), runs) as target:
        yield run_clients(runs, target)


@pytest.mark.parametrize("release", SMOKE)
def test_release_works_with_this_server(found: dict[str, Verdicts], release: str) -> None:
    assert failures(found[release]) == {}
    # A call that a release no longer seems to have would hide a mistake of the script.
    assert found[release] == read_results()[release]
