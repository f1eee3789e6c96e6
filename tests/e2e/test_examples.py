"""The examples run as a user runs them, with a tiny random model instead of a useful one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import API_KEY, run_server
from tests.models import write_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("examples")
    model = write_tiny_model(directory / "llama", "llama", tie=True)
    with run_server("--base-model", str(model), "--data-dir", str(directory / "data")) as url:
        yield url


def run_example(url: str, name: str, *flags: str) -> str:
    environment = {**os.environ, "TINKER_BASE_URL": url, "TINKER_API_KEY": API_KEY, "OMP_NUM_THREADS": "1"}
    # A deprecated call would still work, but an example should not teach it.
    command = [sys.executable, "-W", "error::FutureWarning", str(EXAMPLES / name), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_supervised_example_reports_losses_answers_and_draws(url: str, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "loss.png"
    output = run_example(url, "supervised.py", "--steps", "2", "--batch-size", "4", "--picture", str(picture))
    before, after = re.findall(r"held-out loss per token: ([\d.]+) before, ([\d.]+) after", output)[0]
    assert float(after) < float(before)
    assert "before:" in output
    assert "after:" in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_rl_example_reports_the_reward_of_each_step(url: str) -> None:
    output = run_example(url, "rl.py", "--steps", "2", "--prompts", "2", "--group-size", "3")
    assert len(re.findall(r"step +\d+  mean reward \d\.\d\d", output)) == 2
