"""Fuzz one target or all: `python -m tests.fuzz.run [TARGET ...] --seconds 600 --results benchmarks/results`.

Needs atheris. Each target runs in a process of its own, begins with the committed corpus, and writes one JSON file:
seconds, executions, sizes of the corpus, findings, peak memory, versions. Inputs that break something are kept in
`.cache/fuzz`. The exit status is the number of findings.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import attrs

ROOT = Path(__file__).parent.parent.parent
CORPUS = Path(__file__).parent / "corpus"
WORK = ROOT / ".cache" / "fuzz"
NAMES = ("proto", "unpack", "json", "routes")
MAX_INPUT = {"proto": 4096, "unpack": 4096, "json": 4096, "routes": 4096}
TIMEOUT = {"proto": 20, "unpack": 20, "json": 20, "routes": 120}
"""Seconds that one input may take; with routes it may happen to start a whole server."""
LIBRARIES = ("atheris", "orjson", "protobuf", "zstandard", "starlette", "numpy", "tinker-server")
_STARTING_SECONDS = 120


@attrs.define(kw_only=True)
class Tally:
    """What the processes of one target have done so far."""

    executions: int = 0
    peak_rss_mb: int = 0
    features: int = 0
    findings: list[dict[str, str]] = attrs.field(factory=list)

    def add(self, log: str, artifacts: Path) -> None:
        """Read what libFuzzer printed at its end, and the inputs that it has kept."""
        self.executions += _last_number(r"stat::number_of_executed_units:\s+(\d+)", log)
        self.peak_rss_mb = max(self.peak_rss_mb, _last_number(r"stat::peak_rss_mb:\s+(\d+)", log))
        self.features = max(self.features, _last_number(r"\bft: (\d+)", log))
        known = {finding["input"] for finding in self.findings}
        for artifact in sorted(set(artifacts.iterdir())):
            if artifact.name not in known:
                self.findings.append({"input": artifact.name, "error": _error_of(log)})


def _last_number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def _error_of(log: str) -> str:
    lines = [
        line
        for line in log.splitlines()
        if re.match(r"\w+(\.\w+)*(Error|Exception|Timeout)\b", line) or "ERROR: " in line
    ]
    return lines[0][:300] if lines else "unknown; see the log"


def fuzz(name: str, seconds: int) -> dict[str, object]:
    """Fuzz one target for so long, through findings and all."""
    directory = WORK / name
    shutil.rmtree(directory, ignore_errors=True)
    artifacts, corpus = directory / "findings", directory / "corpus"
    artifacts.mkdir(parents=True)
    shutil.copytree(CORPUS / name, corpus)
    tally, started = Tally(), time.monotonic()
    while (left := seconds - int(time.monotonic() - started)) > 0:
        flags = [
            f"-max_total_time={left}",
            "-print_final_stats=1",
            f"-max_len={MAX_INPUT[name]}",
            f"-timeout={TIMEOUT[name]}",
        ]
        command = [sys.executable, "-m", "tests.fuzz.child", name, str(corpus), *flags, "-rss_limit_mb=4096"]
        done = subprocess.run(
            [*command, f"-artifact_prefix={artifacts}/"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=left + _STARTING_SECONDS,
        )
        (directory / "log.txt").write_text(done.stdout + done.stderr)
        before = tally.executions
        tally.add(done.stdout + done.stderr, artifacts)
        if done.returncode != 0 and tally.executions == before:
            raise SystemExit(f"the fuzzer does not run:\n{done.stderr[-3000:]}")
    return {
        "target": name,
        "seconds": round(time.monotonic() - started),
        "executions": tally.executions,
        "corpus_seeds": len(list((CORPUS / name).iterdir())),
        "corpus_after": len(list(corpus.iterdir())),
        "features_covered": tally.features,
        "findings": tally.findings,
        "peak_rss_mb": tally.peak_rss_mb,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {platform.system()}",
        "libraries": {library: importlib.metadata.version(library) for library in LIBRARIES},
    }


def main() -> int:
    """Parse the command line and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"some of {', '.join(NAMES)}; without it all")
    parser.add_argument("--seconds", type=int, default=60, help="per target (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="directory for fuzz-TARGET.json")
    given = parser.parse_args()
    if unknown := set(given.targets) - set(NAMES):
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}")
    findings = 0
    for name in given.targets or NAMES:
        result = fuzz(name, given.seconds)
        findings += len(result["findings"])  # type: ignore[arg-type]
        text = json.dumps(result, indent=2) + "\n"
        sys.stdout.write(text)
        sys.stdout.flush()
        if given.results is not None:
            given.results.mkdir(parents=True, exist_ok=True)
            (given.results / f"fuzz-{name}.json").write_text(text)
    return min(findings, 100)


if __name__ == "__main__":
    raise SystemExit(main())
