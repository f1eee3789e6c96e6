"""Directories that stand for a model and data sets of the Hugging Face hub.

Transformers, datasets and the cookbook take a name such as ORG/NAME for a directory, if the current one has it. A
recipe that is run there as it stands reads local files by the names that are written in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from running import Run

GSM8K = "---\nconfigs:\n- config_name: main\n  data_files: train.jsonl\n---\n"


def link_model(run: Run) -> None:
    """Put the model's directory where its name leads to."""
    if run.directory is None:
        sys.exit(f"{run.model} is a name that the cookbook must know; give the model's directory with --directory")
    link = run.output / run.model
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(run.directory.resolve())


def write_rows(run: Run, name: str, rows: Iterable[Mapping[str, object]], readme: str | None = None) -> None:
    """A data set with one split, train; the read-me may name configurations."""
    directory = run.output / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if readme:
        (directory / "README.md").write_text(readme)


def run_recipe(run: Run, module: str, **arguments: object) -> None:
    """Run a recipe's own command; raises `subprocess.CalledProcessError` if it fails."""
    command = [sys.executable, "-m", f"tinker_cookbook.recipes.{module}", f"model_name={run.model}"]
    command += [f"log_path={Path(run.log_path()).resolve()}", *(f"{key}={value}" for key, value in arguments.items())]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str((run.output / "cache").resolve())}
    subprocess.run(command, cwd=run.output, check=True, env={**os.environ, **offline})
