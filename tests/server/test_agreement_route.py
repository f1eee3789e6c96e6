"""Trainer and sampler are compared when an operator asks, over HTTP, and the figures are metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.beside_sampler import Beside
from tests.server.conftest import Api, open_api
from tests.server.test_metrics import value

BASE = {"base_model": "tiny"}


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[tuple[Api, Beside]]:
    plugin = Beside(name="held")
    engine = {"agreement_tolerance": 1.0, "handoff_dir": tmp_path}
    with open_api(tmp_path / "data", sampler=plugin, engine=engine) as api:
        api.model(api.session())  # the workers run
        yield api, plugin


def test_figures_and_tolerance_are_told_and_are_metrics(beside: tuple[Api, Beside]) -> None:
    api, _ = beside
    assert value(api, "tinker_agreement_within_tolerance", **BASE) == 1  # of the comparison at the start
    answer = api.http.post("/agreement", params=BASE)
    assert answer.status_code == 200
    report = answer.json()
    assert report["agrees"]
    assert report["dtype"] == "float32"
    assert report["tolerance"] == {"max": 1e-2, "mean": 1e-3, "kl": 1e-5}
    assert report["figures"].keys() == {"base", "adapter", "decode"}
    for compared, figures in report["figures"].items():
        for name, figure in figures.items():
            assert value(api, f"tinker_agreement_{name}", compared=compared, **BASE) == figure


def test_a_disagreement_is_answered_with_503_and_the_server_is_not_ready_until_it_is_over(
    beside: tuple[Api, Beside],
) -> None:
    api, plugin = beside
    plugin.fault = "scale"
    answer = api.http.post("/agreement", params=BASE)
    assert (answer.status_code, answer.json()["agrees"]) == (503, False)
    assert "the way of adapters" in answer.json()["suspect"]
    ready = api.http.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["models"]["tiny"].startswith("doubtful: trainer and sampler")
    assert value(api, "tinker_agreement_within_tolerance", **BASE) == 0
    assert value(api, "tinker_agreement_mean", compared="adapter", **BASE) > 0.05
    plugin.fault = None
    assert api.http.post("/agreement", params=BASE).status_code == 200
    assert api.http.get("/readyz").json() == {"ready": True, "models": {"tiny": "ready"}}
    assert value(api, "tinker_agreement_within_tolerance", **BASE) == 1


def test_a_figure_that_is_not_finite_is_null(beside: tuple[Api, Beside]) -> None:
    api, plugin = beside
    plugin.fault = "nan"
    report = api.http.post("/agreement", params=BASE).json()
    assert report["figures"]["decode"] == {"max": None, "mean": None, "kl": None}
    assert value(api, "tinker_agreement_max", compared="decode", **BASE) == float("inf")


def test_what_cannot_be_compared_is_refused(api: Api) -> None:
    assert "base_model=NAME" in api.http.post("/agreement").json()["detail"]
    assert api.http.post("/agreement", params={"base_model": "other"}).status_code == 404
    assert api.http.get("/agreement").status_code == 405


def test_a_sampler_in_the_ranks_is_compared_when_somebody_asks(api: Api) -> None:
    api.model(api.session())
    assert value(api, "tinker_agreement_within_tolerance", **BASE) == 0  # it is not there
    assert "tinker_agreement_within_tolerance{" not in api.http.get("/metrics").text
    assert api.http.post("/agreement", params=BASE).json()["agrees"]
    assert value(api, "tinker_agreement_within_tolerance", **BASE) == 1
