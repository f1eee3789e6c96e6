"""Runs the conformance script over releases of the SDK, against one real server with a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path

import attrs

from tests.conformance.overriding import override_client_config
from tests.conformance.releases import HASHES, REPRESENTATIVE, install
from tests.e2e.conftest import run_server
from tests.models import VOCAB_SIZE, write_tiny_model
from tinker_core.engine.keyring import new_key
from tinker_core.storage import ControlStore, database_url

CLIENT = Path(__file__).parent / "client.py"
RESULTS = Path(__file__).parent / "results.json"
SECONDS = 300
"""After which one client is stopped; it takes about ten."""


@attrs.frozen
class Run:
    """One release, perhaps with other answers of ``client/config`` than the server's own."""

    release: str
    flags: Mapping[str, bool] = attrs.field(factory=dict)

    @property
    def name(self) -> str:
        """Release and flags."""
        flags = ", ".join(name if value else f"no {name}" for name, value in self.flags.items())
        return f"{self.release} with {flags}" if flags else self.release


FLAGGED = (
    Run("0.18.2", {"pjwt_auth_enabled": True}),
    Run(
        "0.24.1",
        {
            "proto_write_fwdbwd": True,
            "proto_compress_fwdbwd": True,
            "fwd_via_fwdbwd": True,
            "create_model_via_load_weights": True,
        },
    ),
    Run("0.36.0", {"create_model_via_load_weights": True, "parallel_fwdbwd_chunks": False}),
    Run(
        "0.38.0",
        {
            "proto_compress_fwdbwd": True,
            "sample_use_retrieve_futures": True,
            "sample_join_sampling_session": False,
            "custom_loss_server_side": False,
            "pjwt_auth_enabled": True,
        },
    ),
)
"""What clients can be told to do otherwise."""

REPRESENTATIVE_RUNS = (*(Run(release) for release in REPRESENTATIVE), *FLAGGED)
ALL_RUNS = (*(Run(release) for release in HASHES), *FLAGGED)

Verdicts = dict[str, str]
"""``ok``, ``absent`` or ``failed: why`` by operation."""


@attrs.frozen
class Target:
    """A server to talk to."""

    url: str
    base_model: str
    keys: Mapping[str, str]
    """An API key for each run, by name: releases before 0.28 cannot read a listing of what later ones may save."""


@contextlib.contextmanager
def serve(directory: Path, runs: Sequence[Run]) -> Iterator[Target]:
    """A ``tinker-server`` process with the FSDP backend, a tiny model and room for all runs."""
    (directory / "data").mkdir()
    keys = asyncio.run(make_keys(directory / "data", [run.name for run in runs]))
    # Three levels below the root, for the SDK takes two slashes for an owner, a name and a variant.
    model = write_tiny_model(directory / "models" / "tiny", "llama", tie=True)
    flags = ["--base-model", str(model), "--data-dir", str(directory / "data"), "--backend", "fsdp"]
    flags += ["--sampler", "colocated", "--max-context-length", "64", "--max-models", "4096"]
    with run_server(*flags) as url:
        yield Target(url, str(model), keys)


async def make_keys(data_dir: Path, owners: Sequence[str]) -> dict[str, str]:
    """A new key for each owner, in a data directory that no server uses yet."""
    made = {}
    control = await ControlStore.open(database_url(data_dir))
    try:
        for owner in owners:
            made[owner], record = new_key(owner, owner, datetime.now(UTC))
            await control.keys.add(record)
    finally:
        await control.close()
    return made


def run_client(run: Run, target: Target) -> Verdicts:
    """Drive one release; a script that does not come to its end counts as a failure of its own."""
    packages = install(run.release)
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        url = stack.enter_context(override_client_config(target.url, run.flags)) if run.flags else target.url
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": home,
            "PYTHONPATH": str(packages),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TINKER_BASE_URL": url,
            "TINKER_API_KEY": target.keys[run.name],
            "CONFORMANCE_BASE_MODEL": target.base_model,
            "CONFORMANCE_VOCABULARY": str(VOCAB_SIZE),
            "CONFORMANCE_RELEASE": run.release,
            "CONFORMANCE_SECONDS": str(SECONDS),
        }
        command = [sys.executable, str(CLIENT)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=2 * SECONDS, check=False
        )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    verdicts = {
        line["operation"]: f"failed: {line['detail']}" if line["verdict"] == "failed" else line["verdict"]
        for line in lines
    }
    if done.returncode != 0 or not verdicts:
        verdicts["the script itself"] = f"failed: it ended with {done.returncode}: {done.stderr[-2000:]}"
    return verdicts


def run_clients(
    runs: Sequence[Run], target: Target, *, jobs: int = 2, report: Callable[[Run, Verdicts], None] | None = None
) -> dict[str, Verdicts]:
    """Drive several releases, some at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_client, run, target): run for run in runs}
        found = {}
        for future in as_completed(futures):
            run = futures[future]
            found[run.name] = future.result()
            if report is not None:
                report(run, found[run.name])
    return {run.name: found[run.name] for run in runs}


def failures(verdicts: Verdicts) -> Verdicts:
    """What failed, with the reason."""
    return {name: verdict for name, verdict in verdicts.items() if verdict not in ("ok", "absent")}


def read_results() -> dict[str, Verdicts]:
    """The recorded verdicts by the name of the run."""
    recorded: dict[str, Verdicts] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return recorded


def write_results(found: Mapping[str, Verdicts]) -> None:
    """Record verdicts, one line a run; runs that were not made now keep theirs."""
    recorded = {**read_results(), **found}
    short = {
        name: {operation: verdict.split(":")[0] for operation, verdict in recorded[name].items()}
        for name in (run.name for run in ALL_RUNS)
        if name in recorded
    }
    lines = [f"{json.dumps(name)}: {json.dumps(verdicts)}" for name, verdicts in short.items()]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
