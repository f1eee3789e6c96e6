"""How long a server takes to come back after SIGKILL, part by part, seen from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import tinker
from tinker import types

POLL_SECONDS = 0.01
READY = re.compile(r"ready (?:again )?on (\S+)")


class Supervised:
    """A running ``tinker-server``, its URL, and how long it took to become ready."""

    def __init__(self, process: subprocess.Popen[str], url: str, load_seconds: float) -> None:
        self.url = url
        self.load_seconds = load_seconds
        self._process = process

    def kill_server(self) -> None:
        """SIGKILL the server process, which takes its workers with it; the supervisor stays."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)


@contextmanager
def supervised(model: Path, *flags: str) -> Iterator[Supervised]:
    """Start the command on an empty data directory."""
    with tempfile.TemporaryDirectory() as directory:
        script = str(Path(sys.executable).parent / "tinker-server")
        command = [script, "--base-model", f"bench={model}", "--port", "0", "--data-dir", directory, *flags]
        started = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            found = next(filter(None, map(READY.search, process.stderr)))
            seconds = time.perf_counter() - started
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield Supervised(process, found.group(1), seconds)
        finally:
            process.terminate()
            process.wait(timeout=60)


def measure_recovery(
    model: Path, data: list[types.Datum], rank: int, steps: int, flags: tuple[str, ...]
) -> dict[str, float]:
    """Seconds from SIGKILL, ``steps`` steps after a snapshot, until each part of the recovery was done.

    ``load``: the first start, with nothing to recover. ``accepting``: a request was in the journal and answered.
    ``ready``: the workers were loaded again. ``restored``: the model ran its first request after its snapshot was
    loaded, replay not begun. ``replayed``: everything since the snapshot was done again, and one step more.
    """
    with supervised(model, *flags) as server, tinker.ServiceClient(base_url=server.url, api_key="tml-bench") as service:
        client = service.create_lora_training_client(base_model="bench", rank=rank, train_unembed=False).result()

        def step() -> None:
            passed = client.forward_backward(data, "cross_entropy")
            stepped = client.optim_step(types.AdamParams(learning_rate=1e-4))
            passed.result()
            stepped.result()

        step()
        client.load_state_with_optimizer(client.save_state("before").result().path).result()  # forces a snapshot
        began = time.perf_counter()
        for _ in range(steps):
            step()
        original = time.perf_counter() - began
        with httpx.Client(base_url=server.url, timeout=120.0) as http:
            server.kill_server()
            killed = time.perf_counter()
            request = {"model_id": client.model_id, "seq_id": 2 * steps + 5, "adam_params": {"learning_rate": 1e-4}}
            future = _until(http, lambda: http.post("/api/v1/optim_step", json=request)).json()["request_id"]
            accepting = time.perf_counter() - killed
            _until(http, lambda: http.get("/readyz"))
            ready = time.perf_counter() - killed
            restored = _wait_resident(http, killed)
            answer = _until(http, lambda: http.post("/api/v1/retrieve_future", json={"request_id": future})).json()
            replayed = time.perf_counter() - killed
            if "error" in answer:
                raise RuntimeError(f"the step after the recovery failed: {answer}")
    return {
        "load_s": round(server.load_seconds, 3),
        "accepting_s": round(accepting, 3),
        "ready_s": round(ready, 3),
        "restored_s": round(restored, 3),
        "replayed_s": round(replayed, 3),
        "replay_steps": steps,
        "original_s": round(original, 3),
    }


def _until(http: httpx.Client, ask: Callable[[], httpx.Response]) -> httpx.Response:
    """Ask until the answer is 200."""
    while True:
        try:
            answer = ask()
        except httpx.TransportError:
            answer = None
        if answer is not None and answer.status_code == 200:
            return answer
        time.sleep(POLL_SECONDS)


def _wait_resident(http: httpx.Client, killed: float) -> float:
    """Seconds until a model is in the workers' memory again."""
    while True:
        if _gauge(http, "resident_models") > 0:
            return time.perf_counter() - killed
        time.sleep(POLL_SECONDS)


def _gauge(http: httpx.Client, name: str) -> float:
    text = http.get("/metrics").raise_for_status().text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"\w*{name}(\{{|\s)", line))
