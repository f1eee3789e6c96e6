"""Runs the matrix and records it: ``python -m tests.conformance all|representative|RELEASE...``."""

# ruff: noqa: T201 - a command

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.conformance.matrix import (
    ALL_RUNS,
    REPRESENTATIVE_RUNS,
    Run,
    Verdicts,
    failures,
    run_clients,
    serve,
    write_results,
)


def chosen(names: list[str]) -> list[Run]:
    """The runs that the arguments name; a release brings its runs with flags."""
    if names == ["all"]:
        return list(ALL_RUNS)
    if names == ["representative"]:
        return list(REPRESENTATIVE_RUNS)
    runs = [run for run in ALL_RUNS if run.release in names]
    missing = sorted(set(names) - {run.release for run in runs})
    if missing:
        sys.exit(f"no such release: {', '.join(missing)}")
    return runs


def report(run: Run, verdicts: Verdicts) -> None:
    """One line a run, and what failed."""
    failed = failures(verdicts)
    counts = [sum(verdict == kind for verdict in verdicts.values()) for kind in ("ok", "absent")]
    print(f"{run.name}: {counts[0]} ok, {counts[1]} absent, {len(failed)} failed", flush=True)
    for operation, reason in failed.items():
        print(f"  {operation}: {reason}", flush=True)


def main() -> int:
    """The exit status: 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="+", metavar="all|representative|RELEASE")
    parser.add_argument("--jobs", type=int, default=2, help="clients at a time")
    arguments = parser.parse_args()
    runs, started = chosen(arguments.releases), time.monotonic()
    with tempfile.TemporaryDirectory() as directory, serve(Path(directory), runs) as target:
        found = run_clients(runs, target, jobs=arguments.jobs, report=report)
    write_results(found)
    green = sum(not failures(verdicts) for verdicts in found.values())
    print(f"{green} of {len(runs)} runs green in {time.monotonic() - started:.0f} s")
    return 0 if green == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
