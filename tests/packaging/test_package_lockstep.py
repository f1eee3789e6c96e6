"""One version, one licence."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tinker_core import __version__

ROOT = Path(__file__).parents[2]
PROJECTS = sorted(ROOT.glob("packages/*/pyproject.toml"))
OURS = {path.parent.name for path in PROJECTS}


def requirements_of(project: dict[str, object]) -> list[Requirement]:
    return [Requirement(text) for text in project["dependencies"]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_packages_have_one_version_and_pin_each_other_to_it(path: Path) -> None:
    document = tomllib.loads(path.read_text())
    assert document["project"]["name"] == path.parent.name
    assert document["project"]["dynamic"] == ["version"]
    about = (path.parent / document["tool"]["hatch"]["version"]["path"]).resolve()
    assert about == ROOT / "packages/tinker-core/src/tinker_core/__about__.py"
    for requirement in requirements_of(document["project"]):
        if requirement.name in OURS:
            assert str(requirement.specifier) == f"=={__version__}"


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_licence_copies_are_identical(path: Path) -> None:
    copy = path.parent / "LICENSE"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_every_package_is_typed_and_says_what_it_is(path: Path) -> None:
    module = path.parent / "src" / path.parent.name.replace("-", "_")
    assert (module / "py.typed").exists()
    assert len((path.parent / "README.md").read_text().splitlines()) > 5


def test_the_changelog_has_the_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_third_party_dependency() -> None:
    pinned = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for path in PROJECTS:
        for requirement in requirements_of(tomllib.loads(path.read_text())["project"]):
            assert requirement.name in OURS | pinned


def test_continuous_integration_runs_the_test_command_of_the_readme() -> None:
    command = "bash scripts/test.sh"
    assert command in (ROOT / "README.md").read_text()
    assert f"exec {command}\n" in (ROOT / ".ci" / "run").read_text()
