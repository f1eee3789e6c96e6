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

import attrs
import httpx
import tinker
from tinker import types

POLL_SECONDS = 0.01
PATIENCE_SECONDS = 120.0
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


class Trainee:
    """A model on such a server, trained by the SDK. It is made from a checkpoint, and so begins with a snapshot."""

    def __init__(self, service: tinker.ServiceClient, data: list[types.Datum], rank: int) -> None:
        first = service.create_lora_training_client(base_model="bench", rank=rank, train_unembed=False).result()
        path = first.save_state("state").result().path
        self._client = service.create_training_client_from_state_with_optimizer(path).result()
        self._data = data
        self._num_requests = 0

    def train(self, steps: int) -> float:
        """Seconds of so many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            passed = self._client.forward_backward(self._data, "cross_entropy")
            stepped = self._client.optim_step(types.AdamParams(learning_rate=1e-4))
            passed.result()
            stepped.result()
        self._num_requests += 2 * steps
        return time.perf_counter() - began

    def next_step(self) -> dict[str, object]:
        """The body of another step, to be sent without the SDK. The model is of no use to the SDK after it."""
        return {
            "model_id": self._client.model_id,
            "seq_id": self._num_requests + 1,
            "adam_params": {"learning_rate": 1e-4},
        }


@attrs.frozen
class Recovery:
    """Seconds from SIGKILL until each was done."""

    accepting: float
    """A request was in the journal and answered."""
    ready: float
    """The workers were loaded."""
    done: float
    """That request had its result, after everything before it."""


def _recover(server: Supervised, trainee: Trainee) -> Recovery:
    with httpx.Client(base_url=server.url, timeout=120.0) as http:
        server.kill_server()
        killed = time.perf_counter()
        step = trainee.next_step()
        future = _until(lambda: http.post("/api/v1/optim_step", json=step)).json()["request_id"]
        accepting = time.perf_counter() - killed
        _until(lambda: http.get("/readyz"))
        ready = time.perf_counter() - killed
        answer = _until(lambda: http.post("/api/v1/retrieve_future", json={"request_id": future})).json()
        if "error" in answer:
            raise RuntimeError(f"the step after the recovery failed: {answer}")
        return Recovery(accepting, ready, time.perf_counter() - killed)


def measure_recovery(
    model: Path, data: list[types.Datum], rank: int, steps: int, flags: tuple[str, ...]
) -> dict[str, float]:
    """Recoveries right after a snapshot and ``steps`` steps after one; the difference is the replay.

    ``load_s`` is the first start, with nothing to recover.
    """
    with supervised(model, *flags) as server, tinker.ServiceClient(base_url=server.url, api_key="tml-bench") as service:
        found = []
        for num_steps in (0, steps):
            trainee = Trainee(service, data, rank)
            original = trainee.train(num_steps)
            found.append(_recover(server, trainee))
    at_once, later = found
    return {
        "load_s": round(server.load_seconds, 3),
        "accepting_s": round(max(at_once.accepting, later.accepting), 3),
        "ready_s": round(max(at_once.ready, later.ready), 3),
        "restore_s": round(at_once.done - at_once.ready, 3),
        "replay_s": round(later.done - later.ready - (at_once.done - at_once.ready), 3),
        "replay_steps": steps,
        "original_s": round(original, 3),
    }


def _until(ask: Callable[[], httpx.Response]) -> httpx.Response:
    """Ask until the answer is 200; raises `RuntimeError` with the last one when it never is."""
    deadline = time.perf_counter() + PATIENCE_SECONDS
    last: object = None
    while time.perf_counter() < deadline:
        try:
            answer = ask()
        except httpx.TransportError as error:
            last = error
        else:
            if answer.status_code == 200:
                return answer
            last = f"{answer.status_code} {answer.text}"
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"no good answer within {PATIENCE_SECONDS:.0f} s: {last!r}")
