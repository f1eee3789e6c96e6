"""What every driver of this folder does around its recipe: arguments, the trainer's log, checks, and a verdict."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import attrs

RENDERER = "qwen3_instruct"
"""Plain ChatML, the chat format of SmolLM2. The cookbook knows no renderer for models it has not heard of."""


@attrs.frozen(kw_only=True)
class Check:
    """A figure before and after training, what is asked of it in words, and whether it is so."""

    what: str
    before: float
    after: float
    needs: str
    passed: bool


def falls(what: str, before: float, after: float, *, by: float) -> Check:
    return Check(what=what, before=before, after=after, needs=f"falls by at least {by:g}", passed=before - after >= by)


def rises(what: str, before: float, after: float, *, below: float, above: float) -> Check:
    needs = f"from below {below:g} to above {above:g}"
    return Check(what=what, before=before, after=after, needs=needs, passed=before < below and after > above)


@attrs.frozen(kw_only=True)
class Run:
    """One run of one recipe."""

    model: str
    output: Path
    teacher: str | None
    directory: Path | None
    started: float

    @classmethod
    def start(cls, description: str | None) -> Run:
        """Read the command line."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--model", required=True, help="base model as the server names it: a directory or ORG/NAME")
        parser.add_argument("--output", type=Path, required=True, help="directory for logs and the verdict")
        parser.add_argument("--teacher", help="tinker:// path of the teacher's sampler weights, for distillation")
        parser.add_argument("--directory", type=Path, help="directory of the model, where its name is not one")
        args = parser.parse_args()
        args.output.mkdir(parents=True, exist_ok=True)
        return cls(**vars(args), started=time.monotonic())

    def log_path(self, name: str = "log") -> str:
        """A directory for the trainer's own log."""
        return str(self.output / name)

    def series(self, metric: str, name: str = "log") -> list[float]:
        """All values of a metric that the trainer logged, in order."""
        lines = (Path(self.log_path(name)) / "metrics.jsonl").read_text().splitlines()
        return [row[metric] for row in map(json.loads, lines) if metric in row]

    def ends(self, metric: str, count: int, name: str = "log") -> tuple[float, float]:
        """Means of the first and of the last ``count`` values of a metric."""
        values = self.series(metric, name)
        return statistics.fmean(values[:count]), statistics.fmean(values[-count:])

    def checkpoint(self, key: str, name: str = "log") -> str:
        """The tinker:// path of the last checkpoint; the key is state_path or sampler_path."""
        lines = (Path(self.log_path(name)) / "checkpoints.jsonl").read_text().splitlines()
        return [row[key] for row in map(json.loads, lines) if key in row][-1]

    def finish(self, *checks: Check, recipe: str, runs: str, **extra: object) -> None:
        """Write result.json; leave with status 1 if a check failed."""
        seconds = round(time.monotonic() - self.started)
        result = {"recipe": recipe, "runs": runs, "checks": [attrs.asdict(check) for check in checks], **extra}
        (self.output / "result.json").write_text(json.dumps({**result, "seconds": seconds}, indent=2) + "\n")
        for check in checks:
            verdict = "passed" if check.passed else "FAILED"
            print(f"{verdict}: {check.what}: {check.before:.3f} -> {check.after:.3f}, {check.needs}")
        sys.exit(not all(check.passed for check in checks))
