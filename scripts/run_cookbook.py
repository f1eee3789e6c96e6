"""Runs the drivers in examples/cookbook/ against one real server and writes benchmarks/results/cookbook.json.

Wants an environment with requirements/server.txt and requirements/cookbook.txt, and tinker-cookbook itself; the nox
session ``cookbook`` makes one. Arguments: names of drivers, for some of them only; results are then written only with
``--because``, which replaces their rows and keeps the earlier ones with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
DRIVERS = ROOT / "examples" / "cookbook"
RESULTS = ROOT / "benchmarks" / "results" / "cookbook.json"
KNOWN_NAME = "Qwen/Qwen3-4B-Instruct-2507"
"""A name the cookbook knows, with the chat format of the model; served beside the directory for recipes/*_loop.py."""

RECIPES = (
    "supervised",
    "rl_sync",
    "rl_streaming",
    "rl_async",
    "dpo",
    "distillation_on_policy",
    "distillation_off_policy",
    "sdft",
    "recipe_sl_loop",
    "recipe_rl_loop",
    "recipe_math_rl",
    "recipe_shorter",
)
TEACHER = "supervised"
NEED_TEACHER = ("distillation_on_policy", "distillation_off_policy")
NEED_KNOWN_NAME = ("recipe_sl_loop", "recipe_rl_loop")
VERSIONS = ("tinker", "tinker-cookbook", "torch", "transformers", "datasets")
SECONDS_PER_RECIPE = 1800


def ready_line(line: str, log: IO[str]) -> re.Match[str] | None:
    """Log a line of the server; the match that has its URL, once it is ready."""
    log.write(line)
    return re.match(r"tinker-server ready on (\S+)", line)


@contextlib.contextmanager
def server(model: str, output: Path) -> Iterator[str]:
    """A tinker-server process on the CPU with the FSDP backend; yields its URL once it is ready."""
    command = [str(Path(sys.executable).parent / "tinker-server"), "--backend", "fsdp", "--device", "cpu"]
    command += ["--base-model", model, "--base-model", f"{KNOWN_NAME}={model}", "--data-dir", str(output / "data")]
    command += ["--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with (output / "server.log").open("w", buffering=1) as log:
        try:
            url = next((found[1] for line in process.stderr if (found := ready_line(line, log))), None)
            if url is None:
                sys.exit(f"the server did not start; see {log.name}")
            rest = threading.Thread(target=shutil.copyfileobj, args=(process.stderr, log))
            rest.start()
            try:
                yield url
            finally:
                process.terminate()
                rest.join()
        finally:
            process.terminate()
            status = process.wait(timeout=60)
    if status != 0:
        sys.exit(f"the server ended with status {status}; see {output / 'server.log'}")


def run(driver: str, model: str, output: Path, url: str) -> dict[str, Any]:
    """Run one driver; what it reports, with a verdict in words."""
    command = [sys.executable, str(DRIVERS / f"{driver}.py"), "--output", str(output / driver)]
    command += ["--model", KNOWN_NAME, "--directory", model] if driver in NEED_KNOWN_NAME else ["--model", model]
    teacher = output / TEACHER / "result.json"
    if driver in NEED_TEACHER:
        if not teacher.exists():
            return {"driver": driver, "verdict": "failed", "error": [f"{TEACHER} made no teacher"], "seconds": 0}
        command += ["--teacher", json.loads(teacher.read_text())["sampler_path"]]
    environment = {**os.environ, "TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-cookbook", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    log = output / f"{driver}.log"
    with log.open("w") as stream:
        status = run_at_most(SECONDS_PER_RECIPE, command, environment, stream)
    result = output / driver / "result.json"
    if result.exists():
        verdict = "passed" if status == 0 else "did not learn enough"
        report = {"driver": driver, "verdict": verdict, **json.loads(result.read_text())}
    else:
        last = log.read_text().strip().splitlines()[-1:]
        report = {"driver": driver, "verdict": "failed", "error": last, "seconds": round(time.monotonic() - started)}
    print(f"{driver}: {report['verdict']}, {report['seconds']} s", flush=True)
    return report


def run_at_most(seconds: int, command: Sequence[str], environment: dict[str, str], stream: IO[str]) -> int:
    """Exit status of a command; it and the processes it started are killed when time is over."""
    process = subprocess.Popen(
        command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        stream.write(f"\nstopped after {seconds} s")
        return 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def machine() -> str:
    """The processor that the seconds belong to."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    return f"{model.partition(':')[2].strip() or platform.machine()}, {os.cpu_count()} cores, {threads} torch thread(s)"


def run_all(drivers: Sequence[str], model: str, output: Path) -> list[dict[str, Any]]:
    """Reports of all drivers, in order, against one server."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    with server(model, output) as url:
        return [run(driver, model, output, url) for driver in drivers]


def record_again(reports: Sequence[dict[str, Any]], reason: str) -> None:
    """Replace rows of the recorded run; each new row keeps the one that it replaces, and the reason."""
    results = json.loads(RESULTS.read_text())
    again = {report["driver"]: report for report in reports}
    for index, row in enumerate(results["recipes"]):
        if row["driver"] in again:
            earlier = [*row.pop("earlier", []), {**row, "reason": reason}]
            results["recipes"][index] = {**again[row["driver"]], "earlier": earlier}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    """Run what was asked for; status 1 unless all of it passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drivers", nargs="*", metavar="DRIVER", help=", ".join(RECIPES))
    parser.add_argument("--model", help="a model directory; default: SmolLM2-135M-Instruct out of a package")
    parser.add_argument("--because", metavar="REASON", help="record named drivers; why they are run again")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "cookbook", help="directory, emptied first")
    args = parser.parse_args()
    if unknown := set(args.drivers) - set(RECIPES):
        parser.error(f"no driver is called {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    prepare = [sys.executable, str(ROOT / "scripts" / "prepare_smollm2.py")]
    model = args.model or subprocess.run(prepare, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    drivers = args.drivers or list(RECIPES)
    if TEACHER not in drivers and not set(drivers).isdisjoint(NEED_TEACHER):
        drivers.insert(0, TEACHER)
    reports = run_all(drivers, model, args.output.resolve())
    if not args.drivers:
        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        results = {"model": "SmolLM2-135M-Instruct" if not args.model else Path(model).name, "machine": machine()}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({**results, "versions": versions, "recipes": reports}, indent=2) + "\n")
    elif args.because:
        record_again(reports, args.because)
    sys.exit(not all(report["verdict"] == "passed" for report in reports))


if __name__ == "__main__":
    main()
