"""The recorded verdicts cover every release and every operation, and none is bad."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conformance.matrix import ALL_RUNS, failures, read_results
from tests.conformance.releases import HASHES, RELEASES, REPRESENTATIVE, SMOKE

ROOT = Path(__file__).parents[2]
OPERATIONS = [
    name
    for path in sorted((ROOT / "tests/conformance/operations").glob("*.py"))
    for name in re.findall(r'^@operation\("(.+)"\)$', path.read_text(), re.MULTILINE)
]


def test_all_66_releases_are_recorded_and_none_failed() -> None:
    recorded = read_results()
    assert len(RELEASES) == 66
    assert (RELEASES[0], RELEASES[-1]) == ("0.3.0", "0.38.0")
    assert set(recorded) == {run.name for run in ALL_RUNS}
    assert {name: failures(verdicts) for name, verdicts in recorded.items() if failures(verdicts)} == {}


def test_the_record_is_of_the_operations_that_the_script_has() -> None:
    assert len(OPERATIONS) > 70
    assert {tuple(sorted(verdicts)) for verdicts in read_results().values()} == {tuple(sorted(OPERATIONS))}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_absent_only_before_its_first_or_after_its_last_release(operation: str) -> None:
    recorded = read_results()
    verdicts = "".join("x" if recorded[release][operation] == "ok" else "-" for release in RELEASES)
    assert re.fullmatch("-*x+-*", verdicts)


def test_the_named_releases_exist() -> None:
    assert set(SMOKE) < set(REPRESENTATIVE) < set(HASHES)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in HASHES.values())
