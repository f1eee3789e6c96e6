"""The README's table of features: each row leads to a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("## What there is", 1)[-1].split("\n## ", 1)[0]
ROWS = [line.strip("|").split("|") for line in SECTION.splitlines() if line.startswith("| ") and "---" not in line][1:]


def test_the_table_has_rows_of_three_cells() -> None:
    assert len(ROWS) >= 20
    assert {len(row) for row in ROWS} == {3}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_every_feature_links_to_its_test(row: list[str]) -> None:
    links = re.findall(r"\[`(\w+)`\]\((tests/[\w/.]+\.py)\)", row[-1])
    assert links, "a feature without a test"
    for name, target in links:
        text = (ROOT / target).read_text()
        assert re.search(rf"^\s*(async def|def|class) {name}\b", text, re.MULTILINE), (name, target)
