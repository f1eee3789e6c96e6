"""One run of one loop against a real server, disturbed or not, and everything that can be compared about it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import httpx

from tests.chaos.client import API_KEY
from tests.chaos.command import Command, python_path
from tests.chaos.killer import Killer
from tests.chaos.plan import KillPoint
from tests.chaos.proxy import Ledger, Proxy
from tests.chaos.traps import PLUGIN
from tinker_core.testing.fakes import FAKE_PLUGIN

FINAL_KINDS = ("weights", "sampler_weights")


@attrs.frozen(kw_only=True)
class Setup:
    """A kind of server."""

    base_model: str
    flags: tuple[str, ...]
    plugins: str


def fake_setup(*flags: str) -> Setup:
    """Fake models: no torch, and a second to start."""
    chosen = ("--base-model", "tiny", "--backend", "fake", "--sampler", "fake", "--device", "cpu")
    return Setup(base_model="tiny", flags=(*chosen, *flags), plugins=FAKE_PLUGIN)


def real_setup(model: Path, *flags: str) -> Setup:
    """FSDP2 workers with the colocated sampler."""
    chosen = ("--base-model", str(model), "--device", "cpu", "--max-context-length", "64")
    return Setup(base_model=str(model), flags=(*chosen, *flags), plugins="fsdp")


@attrs.frozen(kw_only=True)
class Left:
    """What the server has after a run."""

    files: dict[str, str] = attrs.field(factory=dict)
    """Digests of the files of the final checkpoints, by kind and name."""
    checkpoints: list[str] = attrs.field(factory=list)
    """Listed checkpoints of all runs, in the order of the runs: run number, kind and name."""
    refetched: dict[str, str] = attrs.field(factory=dict)
    """What was wrong with results that were fetched again, by request id."""


@attrs.frozen(kw_only=True)
class Outcome:
    """What a run left behind."""

    code: int
    """The client's exit status."""
    complaints: str
    """The client's standard error."""
    record: list[dict[str, Any]]
    ledger: Ledger
    moments: int
    left: Left
    usage: dict[str, float]
    """Amounts by kind."""
    deaths: tuple[str, ...]
    missed: tuple[str, ...]
    orphans: tuple[int, ...]
    starts: int
    log: Path


def run_loop(
    loop: str,
    setup: Setup,
    steps: int,
    directory: Path,
    points: Sequence[KillPoint] = (),
    *,
    timeout: float = 240.0,
    between_lives: Callable[[], None] = lambda: None,
    last_death: bool = True,
) -> Outcome:
    """Run a loop to its end. A client that takes longer than ``timeout`` seconds is killed and has failed.

    ``last_death``: of a disturbed run, everything is killed once more before what it left is looked at.
    """
    traps, record = directory / "traps", directory / "record.jsonl"
    traps.mkdir(parents=True)
    left = Left()
    with _command(setup, directory, between_lives) as command:
        command.wait_ready()
        killer = Killer(command, list(points), traps)
        with Proxy(command.port, killer.on_moment) as proxy:
            arguments = ["--url", proxy.url, "--base-model", setup.base_model, "--steps", str(steps)]
            code, complaints = _run_client([loop, *arguments, "--record", str(record)], command, directory, timeout)
        killer.close()
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        if code == 0:
            if points and last_death:
                killer.deaths.append("after the end: all")
                command.forget_ready()
                command.kill("all")
                command.wait_ready()
            left = _look(command.url, proxy.ledger, lines[-1])
    return Outcome(
        code=code,
        complaints=complaints,
        record=lines,
        ledger=proxy.ledger,
        moments=proxy.num_moments,
        left=left,
        usage=_usage(command.data_dir),
        deaths=tuple(killer.deaths),
        missed=tuple(killer.missed),
        orphans=tuple(command.orphans),
        starts=command.starts,
        log=command.log,
    )


def _command(setup: Setup, directory: Path, between_lives: Callable[[], None]) -> Command:
    data_dir = directory / "data"
    return Command(
        *setup.flags,
        data_dir=data_dir,
        log=directory / "server.log",
        environment={
            "TINKER_PLUGINS": f"{setup.plugins},{PLUGIN}",
            "TINKER_CHAOS_TRAPS": str(directory / "traps"),
            "TINKER_CHAOS_DATA": str(data_dir),
        },
        between_lives=between_lives,
    )


def _look(url: str, ledger: Ledger, done: dict[str, Any]) -> Left:
    with httpx.Client(base_url=url, headers={"x-api-key": API_KEY}, timeout=60.0) as http:
        return Left(
            files=_final_files(http, done), checkpoints=_checkpoints(http), refetched=_fetch_again(http, ledger)
        )


def _run_client(arguments: Sequence[str], server: Command, directory: Path, timeout: float) -> tuple[int, str]:
    """The client's exit status and standard error; it is killed when the server has given up."""
    command = [sys.executable, "-m", "tests.chaos.client", *arguments]
    environment = {**os.environ, "PYTHONPATH": python_path(), "TINKER_TELEMETRY": "0", "OMP_NUM_THREADS": "1"}
    complaints = directory / "client.log"
    with complaints.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=directory)
        server.when_over(process.kill)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            log.write(f"\nthe client did not end within {timeout:.0f} s\n")
            code = process.wait()
    return code, complaints.read_text()


def _final_files(http: httpx.Client, done: dict[str, Any]) -> dict[str, str]:
    digests = {}
    for path in (done["state"], done["path"]):
        run, kind, name = path.removeprefix("tinker://").split("/")
        target = f"/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/archive"
        link = http.get(target, headers={"accept": "application/json"}).raise_for_status().json()["url"]
        with tarfile.open(fileobj=io.BytesIO(http.get(link).raise_for_status().content)) as archive:
            for member in archive.getmembers():
                if member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None
                    digests[f"{kind}/{member.name}"] = hashlib.sha256(content.read()).hexdigest()
    return digests


def _checkpoints(http: httpx.Client) -> list[str]:
    """Every listed checkpoint; runs are numbered in the order in which they were made."""
    listed = http.get("/api/v1/checkpoints", params={"limit": 1000}).raise_for_status().json()["checkpoints"]
    paths = [found["tinker_path"].removeprefix("tinker://").split("/", 1) for found in listed]
    runs = sorted({run for run, _ in paths}, key=lambda run: int(run.rpartition(":")[2]))
    return sorted(f"{runs.index(run)}/{rest}" for run, rest in paths)


def _fetch_again(http: httpx.Client, ledger: Ledger) -> dict[str, str]:
    """Ask for every acknowledged request once more: delivered results must be the same, others there and fine."""
    wrong = {}
    accepts: dict[str, list[bytes]] = {request_id: [] for request_id in ledger.accepted}
    for request_id, accept in ledger.delivered:
        accepts[request_id].append(accept)
    for request_id, forms in accepts.items():
        for accept in forms or [b"application/json"]:
            body = {"request_id": request_id, "allow_metadata_only": False}
            answer = http.post("/api/v1/retrieve_future", json=body, headers={"accept": accept.decode()})
            if answer.status_code != 200:
                wrong[request_id] = f"{ledger.accepted[request_id]}: {answer.status_code} {answer.text[:200]}"
                continue
            digest = hashlib.sha256(answer.content).hexdigest()
            if {digest} != (ledger.delivered.get((request_id, accept)) or {digest}):
                wrong[request_id] = f"{ledger.accepted[request_id]}: another version"
    return wrong


def _usage(data_dir: Path) -> dict[str, float]:
    """Token amounts by kind, as the operator sees them after the server stopped."""
    command = [str(Path(sys.executable).parent / "tinker-server"), "usage", "--data-dir", str(data_dir)]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=True)
    amounts: dict[str, float] = {}
    for row in json.loads(done.stdout):
        if row["unit"] == "tokens":
            amounts[row["kind"]] = amounts.get(row["kind"], 0) + row["amount"]
    return amounts
