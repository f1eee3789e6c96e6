"""How soon after SIGKILL of the server process a POST is accepted again, before any model is ready.

The client has a connection of its own for every attempt and sends the next as soon as one fails. Against it: a bare
uvicorn app that a parent with the same listening socket starts again at once. Both are killed in turns.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from support.report import report
from support.server import running

GOAL_SECONDS = 2.0
_READY = re.compile(r"tinker-server ready on (\S+)")
_SESSION = b'{"tags": [], "sdk_version": "0"}'


def seconds_until_accepted(port: int) -> float:
    """Until a POST is answered with 200; attempts that fail with the connection are repeated at once."""
    started = time.perf_counter()
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(
                "POST", "/api/v1/create_session", body=_SESSION, headers={"content-type": "application/json"}
            )
            if connection.getresponse().status == 200:
                return time.perf_counter() - started
        except (ConnectionError, http.client.HTTPException):
            continue
        finally:
            connection.close()


def wait_ready(port: int) -> None:
    """Until all models are ready: the next kill finds a server that has come back whole."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/readyz")
        status = connection.getresponse().status
        connection.close()
        if status == 200:
            return
        time.sleep(0.05)


def server_process(supervisor: int) -> int:
    """The child of a supervisor, as /proc shows it."""
    while True:
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(parent) == supervisor and state != "Z":
                return int(directory.name)


def killing_our_server(supervisor: int, port: int) -> Callable[[], float]:
    def measure() -> float:
        wait_ready(port)
        os.kill(server_process(supervisor), signal.SIGKILL)
        return seconds_until_accepted(port)

    return measure


class BareServer:
    """A uvicorn process and the socket that outlives it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self._process = self._start()
        seconds_until_accepted(self._listener.getsockname()[1])

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("support") / "bare.py"
        descriptor = self._listener.fileno()
        return subprocess.Popen([sys.executable, "-P", str(script), str(descriptor)], pass_fds=[descriptor])

    def measure(self) -> float:
        self._process.kill()
        self._process.wait()
        self._process = self._start()
        return seconds_until_accepted(self._listener.getsockname()[1])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.close()


def supervisor_of(data_dir: str) -> int:
    """The process that was started with a data directory and is nobody's server process."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if data_dir in words and "tinker_server.supervised" not in words:
            return int(directory.name)
    raise RuntimeError(f"no process serves {data_dir}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="only for the report: the fake models need none")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    os.environ["TINKER_PLUGINS"] = "tinker_core.testing.fakes"
    times: dict[str, list[float]] = {"server": [], "bare_uvicorn": []}
    with tempfile.TemporaryDirectory() as data_dir:
        command = [str(Path(sys.executable).parent / "tinker-server"), "--backend", "fake", "--sampler", "fake"]
        command += ["--device", "cpu", "--base-model", "tiny", "--port", "0", "--data-dir", data_dir]
        with running(command, _READY) as url:
            port = int(url.rpartition(":")[2])
            kill_ours = killing_our_server(supervisor_of(data_dir), port)
            bare = BareServer()
            try:
                for _ in range(arguments.repeats):
                    times["server"].append(kill_ours())
                    times["bare_uvicorn"].append(bare.measure())
            finally:
                bare.close()
    median = {way: statistics.median(values) for way, values in times.items()}
    slowest = max(times["server"])
    print(
        f"SIGKILL to accepted POST: median {median['server']:.2f} s, slowest {slowest:.2f} s (goal: {GOAL_SECONDS}); "
        f"bare uvicorn {median['bare_uvicorn']:.2f} s"
    )
    report(
        "restart",
        arguments.device,
        {
            "seconds": {way: round(value, 3) for way, value in median.items()},
            "slowest_seconds": round(slowest, 3),
            "goal_seconds": GOAL_SECONDS,
            "ratio_to_goal": round(median["server"] / GOAL_SECONDS, 3),
            "ratio_to_bare_uvicorn": round(median["server"] / median["bare_uvicorn"], 3),
        },
    )


if __name__ == "__main__":
    main()
