"""The table of recipes shows the recorded run, and the run covered every driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_what_the_results_say() -> None:
    script = str(ROOT / "scripts" / "generate_cookbook_table.py")
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_driver_was_run_with_a_learning_check() -> None:
    drivers = {path.stem for path in (ROOT / "examples/cookbook").glob("*.py") if "\ndef main()" in path.read_text()}
    reports = json.loads((ROOT / "benchmarks/results/cookbook.json").read_text())["recipes"]
    assert {report["driver"] for report in reports} == drivers
    assert all(report["checks"] for report in reports if report["verdict"] != "failed")
