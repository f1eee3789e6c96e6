"""``tinker-server`` as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_server import __version__

COMMAND = [sys.executable, "-m", "tinker_server"]
FAKE = ["--backend", "fake", "--sampler", "fake", "--device", "cpu", "--base-model", "tiny"]


def environment() -> dict[str, str]:
    return {**os.environ, "TINKER_PLUGINS": FAKE_PLUGIN}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=120)


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its base URL, once it says that it is ready."""
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if line.startswith("tinker-server ready on "))
        yield process, line.split()[3]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_version() -> None:
    assert run("--version").stdout == f"tinker-server {__version__}\n"


def test_plugins_as_json() -> None:
    listed = json.loads(run("plugins").stdout)
    assert [plugin["name"] for plugin in listed] == ["core", FAKE_PLUGIN]
    assert listed[0]["distribution"] == "tinker-core"
    assert listed[0]["version"] == __version__
    assert "tinker_register_executor" in listed[0]["hooks"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--base-model", "/models/tiny"], "exactly two slashes"), (["plugins", "x"], "takes no arguments")],
)
def test_what_cannot_work_is_one_line_and_status_2(arguments: list[str], reason: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(*FAKE, "--data-dir", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "choose another --host or --port" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_says_when_it_is_ready_and_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with running(*FAKE, "--data-dir", str(tmp_path), "--port", "0") as (process, url):
        assert httpx.get(f"{url}/readyz").json() == {"ready": True, "models": {"tiny": "ready"}}
        assert httpx.get(f"{url}/healthz").status_code == 200
        process.send_signal(number)
        assert process.wait(timeout=60) == 0


def test_a_signal_ends_long_polls_at_once(tmp_path: Path) -> None:
    with (
        running(*FAKE, "--data-dir", str(tmp_path), "--port", "0") as (process, url),
        httpx.Client(base_url=url) as http,
    ):

        def post(path: str, body: dict[str, object]) -> dict[str, str]:
            answer: dict[str, str] = http.post(f"/api/v1/{path}", json=body).json()
            return answer

        session_id = post("create_session", {})["session_id"]
        new = {"session_id": session_id, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
        created = post("create_model", new)["request_id"]
        model_id = post("retrieve_future", {"request_id": created})["model_id"]
        empty = {"loss_fn": "cross_entropy", "data": []}
        stuck = post("forward_backward", {"model_id": model_id, "seq_id": 2, "forward_backward_input": empty})
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port)) as raw:
            body = json.dumps({"request_id": stuck["request_id"]}).encode()
            head = f"POST /api/v1/retrieve_future HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            http.get("/healthz")
            process.send_signal(signal.SIGTERM)
            assert raw.recv(64).startswith(b"HTTP/1.1 408")
        assert process.wait(timeout=60) == 0


BROKEN_PLUGIN = """
from tinker_core.errors import ConfigurationError
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import TrainerPlugin

def build(context, parts):
    raise ConfigurationError(f"{context.base_model.name} has no weights")

@hookimpl
def tinker_register_trainer(register):
    register(TrainerPlugin(name="broken", build=build))
"""


def test_a_model_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    package = tmp_path / "acme_broken"
    package.mkdir()
    (package / "plugin.py").write_text(BROKEN_PLUGIN)
    variables = {**os.environ, "TINKER_PLUGINS": "acme_broken.plugin", "PYTHONPATH": str(tmp_path)}
    arguments = ["--backend", "broken", "--sampler", "none", "--base-model", "tiny", "--port", "0"]
    command = [*COMMAND, *arguments, "--data-dir", str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=120)
    assert done.returncode == 1
    assert "tiny has no weights" in done.stderr
    assert "ready on" not in done.stderr
