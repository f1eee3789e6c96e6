"""The page docs/reference/compatibility.md, from the recorded verdicts of tests/conformance."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

CONFORMANCE = Path(__file__).parents[1] / "tests" / "conformance"
RESULTS = CONFORMANCE / "results.json"
MARKS = {"ok": "✓", "absent": "·", "failed": "**✗**"}

Verdicts = dict[str, str]

HEADER = """# SDK releases

This server serves every release of the `tinker` SDK from 0.3.0 to 0.38.0; {green} of {releases} are green below. How to
answer is decided by content type, `Accept` and the keys that are present, never by the version of the SDK, with one
exception: `client/config` turns the new transport of 0.22.0 and 0.22.1 off, which cannot download archives.

One script, [tests/conformance/client.py](../../tests/conformance/client.py), drives the real SDK over HTTP against a
real server with a tiny model, and checks values, not only answers. `nox -s sdk_all` makes this table;
`nox -s sdk_representative` runs eleven releases, and the default test command six of them. Every run has an API key, so
an owner, of its own: a release before 0.28.0 cannot read a listing that holds external weights, which later ones save.
"""

LEGEND = """## Release and operation

✓ works, · this release has no such call, **✗** fails. Neighbouring releases with the same verdicts share a column.
"""

FLAGS = """## Flags

Releases run once more, with flags in the answer of `client/config` that this server does not send by itself.
"""


def releases() -> list[str]:
    """All releases, oldest first."""
    lines = (CONFORMANCE / "releases.txt").read_text().splitlines()
    return [line.split()[0] for line in lines if not line.startswith("#")]


def is_green(verdicts: Verdicts) -> bool:
    """Whether everything that the release can do worked."""
    return bool(verdicts) and "failed" not in verdicts.values()


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def columns(runs: dict[str, Verdicts], names: list[str]) -> list[tuple[str, Verdicts]]:
    """Neighbouring releases with equal verdicts, as "first" or "first to last"."""
    grouped = itertools.groupby(names, key=lambda name: runs.get(name, {}))
    found = [(verdicts, list(members)) for verdicts, members in grouped]
    return [
        (members[0] if len(members) == 1 else f"{members[0]} to {members[-1]}", verdicts) for verdicts, members in found
    ]


def counts(verdicts: Verdicts) -> list[str]:
    """How many operations worked, are absent and failed."""
    values = list(verdicts.values())
    return [str(values.count(kind)) for kind in ("ok", "absent", "failed")]


def page() -> str:
    """The whole page, without dates: the same results give the same text."""
    runs: dict[str, Verdicts] = json.loads(RESULTS.read_text())
    names = releases()
    green = sum(is_green(runs.get(name, {})) for name in names)
    found = columns(runs, names)
    operations = list(dict.fromkeys(itertools.chain.from_iterable(runs.values())))
    marks = [
        [f"`{operation}`", *(MARKS[verdicts[operation]] if operation in verdicts else "" for _, verdicts in found)]
        for operation in operations
    ]
    lines = [HEADER.format(green=green, releases=len(names)), LEGEND]
    lines += table(["operation", *(label for label, _ in found)], marks)
    lines += ["", "## Releases", ""]
    lines += table(["release", "works", "absent", "fails"], [[name, *counts(runs.get(name, {}))] for name in names])
    lines += ["", FLAGS]
    flagged = [name for name in runs if name not in names]
    lines += table(["release and flags", "works", "absent", "fails"], [[name, *counts(runs[name])] for name in flagged])
    return "\n".join(lines) + "\n"
