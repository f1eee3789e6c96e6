"""``tinker-server`` as a family of processes: who brings whom back, and who goes with whom."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from tests.processes import children_of, ranks_of
from tests.server.test_command import COMMAND, FAKE, environment
from tests.server.test_routes import pass_body

SECONDS = 60


@attrs.define
class Family:
    """A running supervisor with its descendants."""

    process: subprocess.Popen[str]
    lines: list[str]
    url: str = ""

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The next line of the log that matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        pytest.fail(f"{pattern!r} is not in the log:\n{''.join(self.lines)}")

    @property
    def server(self) -> int:
        [pid] = [pid for pid, words in children_of(self.process.pid).items() if "tinker_server.supervised" in words]
        return pid

    @property
    def rank(self) -> int:
        [pid] = ranks_of(self.server)
        return pid

    def post(self, path: str, body: object) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}/api/v1/{path}", json=body, timeout=SECONDS)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def session(self) -> str:
        return str(self.post("create_session", {"tags": [], "sdk_version": "0"})["session_id"])


@contextmanager
def family(data_dir: Path, *flags: str, plugin: str = "", path: Path | None = None) -> Iterator[Family]:
    """A family of its own session, once it is ready; all of it is gone when the block ends."""
    variables = environment()
    if plugin:
        variables |= {"TINKER_PLUGINS": f"{variables['TINKER_PLUGINS']},{plugin}", "PYTHONPATH": str(path)}
    command = [*COMMAND, *FAKE, "--data-dir", str(data_dir), "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables, start_new_session=True) as process:
        started = Family(process, [])
        try:
            started.url = started.wait_for(r"tinker-server ready on (http://[^\s\"]+)")[1]
            yield started
        finally:
            process.kill()


@contextmanager
def watched(*pids: int) -> Iterator[dict[int, int]]:
    """Descriptors that become readable when the processes end."""
    descriptors = {pid: os.pidfd_open(pid) for pid in pids}
    try:
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def ended(descriptors: dict[int, int]) -> bool:
    """Whether all of them end in good time."""
    return all(select.select([descriptor], [], [], SECONDS)[0] for descriptor in descriptors.values())


VICTIMS = [("supervisor",), ("supervisor", "rank"), ("rank", "server", "supervisor")]


@pytest.mark.parametrize("victims", VICTIMS, ids="+".join)
def test_nobody_outlives_the_supervisor(tmp_path: Path, victims: tuple[str, ...]) -> None:
    with family(tmp_path) as started:
        pids = {"supervisor": started.process.pid, "server": started.server, "rank": started.rank}
        with watched(*pids.values()) as descriptors:
            for victim in victims:
                os.kill(pids[victim], signal.SIGKILL)
            assert ended(descriptors)


def test_the_supervisor_brings_the_server_back_on_the_same_port(tmp_path: Path) -> None:
    with family(tmp_path) as started:
        session_id = started.session()
        for victims in (("server",), ("rank",), ("server", "rank")):
            pids = {"server": started.server, "rank": started.rank}
            gone = [pids["server"], pids["rank"]] if "server" in victims else [pids["rank"]]
            with watched(*gone) as descriptors:
                for victim in victims:
                    os.kill(pids[victim], signal.SIGKILL)
                assert ended(descriptors)
            assert started.process.poll() is None
            # The port is there all the time: this waits in its queue while the next server starts.
            assert started.post("session_heartbeat", {"session_id": session_id}) == {"type": "session_heartbeat"}
            started.wait_for("ready again on" if "server" in victims else "base model 'tiny' is ready")
            assert (started.server == pids["server"]) == ("server" not in victims)
        metrics = httpx.get(f"{started.url}/metrics").text
        assert "tinker_server_restarts_total 2.0" in metrics
        started.process.terminate()
        assert started.process.wait(SECONDS) == 0


def resident_kilobytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


def test_a_hang_up_replaces_the_server_process(tmp_path: Path) -> None:
    with family(tmp_path) as started:
        assert resident_kilobytes(started.process.pid) < 20 * 1024
        before = started.server
        started.process.send_signal(signal.SIGHUP)
        started.wait_for("ready again on")
        assert started.server != before
        started.session()
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(SECONDS) == 0


def test_a_server_in_the_foreground_stops_like_any_other(tmp_path: Path) -> None:
    with family(tmp_path, "--no-supervisor") as started:
        assert all("tinker_server.supervised" not in words for words in children_of(started.process.pid).values())
        started.process.terminate()
        assert started.process.wait(SECONDS) == 0


# --- what stops in order ----------------------------------------------------------------------------------------------

HELD_PLUGIN = """
import os
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import TrainerPlugin
from tinker_core.testing.fakes import FakeTrainer

class Held(FakeTrainer):
    def forward_backward(self, batch):
        if os.path.exists(os.environ["HELD_PIPE"]):
            with open(os.environ["HELD_PIPE"]) as pipe:
                pipe.read()  # until somebody has written there
        return (yield from super().forward_backward(batch))

@hookimpl
def tinker_register_trainer(register):
    register(TrainerPlugin(name="held", build=lambda context, parts: Held(context)))
"""


def test_accepted_work_is_finished_before_the_server_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    monkeypatch.setenv("HELD_PIPE", str(pipe))
    (tmp_path / "acme_held").mkdir()
    (tmp_path / "acme_held" / "plugin.py").write_text(HELD_PLUGIN)
    flags, extra = ("--backend", "held"), {"plugin": "acme_held.plugin", "path": tmp_path}
    with family(tmp_path / "data", *flags, **extra) as started:
        session_id = started.session()
        new = {"session_id": session_id, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
        model_id = started.post("retrieve_future", started.post("create_model", new))["model_id"]
        os.mkfifo(pipe)
        receipt = started.post("forward_backward", pass_body(model_id, 1))
        started.process.terminate()
        started.wait_for("stopping")
        with pytest.raises(httpx.ConnectError):
            started.session()
        pipe.write_text("go on")
        assert started.process.wait(SECONDS) == 0
        assert started.process.stderr is not None
        assert "work is left" not in started.process.stderr.read()
    pipe.unlink()
    with family(tmp_path / "data", *flags, **extra) as started:
        assert started.post("retrieve_future", receipt)["loss_fn_output_type"]


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def test_it_leaves_alone_what_a_script_had_started_before_it_became_the_server(tmp_path: Path) -> None:
    script = f'sleep 600 & echo $! > {tmp_path}/pid; exec "$@"'
    command = ["bash", "-c", script, "bash", *COMMAND, *FAKE, "--data-dir", str(tmp_path), "--port", "0"]
    command += ["--log-format", "json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        started = Family(process, [])
        started.wait_for("ready on")
        other = int((tmp_path / "pid").read_text())
        try:
            os.kill(started.server, signal.SIGKILL)
            started.wait_for("ready again on")
            process.terminate()
            assert process.wait(SECONDS) == 0
            assert "tinker_server.supervisor" in [json.loads(line)["logger"] for line in started.lines]
        finally:
            os.kill(other, signal.SIGKILL)  # raises if it has ended before


def test_settings_that_cannot_work_end_it_at_once(tmp_path: Path) -> None:
    """Nothing is started again that never could start."""
    (tmp_path / "control.sqlite").write_bytes(b"this is no database, whatever its name says" * 100)
    command = [*COMMAND, *FAKE, "--data-dir", str(tmp_path), "--port", str(unused_port())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=SECONDS)
    assert done.returncode == 2
    assert "cannot be opened" in done.stderr
    assert "Traceback" not in done.stderr
    assert "starting another" not in done.stderr


# --- the log ----------------------------------------------------------------------------------------------------------


def test_the_log_as_json_says_what_each_line_is_about(tmp_path: Path) -> None:
    with family(tmp_path, "--log-format", "json", "--access-log") as started:
        session_id = started.session()
        new = {"session_id": session_id, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
        receipt = started.post("create_model", new)
        httpx.get(f"{started.url}/download/traces/x?signature=very-secret", headers={"X-API-Key": "tml-secret"})
        started.process.terminate()
        assert started.process.stderr is not None
        text = [*started.lines, *started.process.stderr]
    lines = [json.loads(line) for line in text]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(line) for line in lines))
    [created] = [line for line in lines if line.get("path") == "/api/v1/create_model"]
    assert created["request_id"] == receipt["request_id"]
    assert (created["method"], created["status"], created["owner"]) == ("POST", 200, "local")
    assert created["model_id"].startswith(session_id)
    assert any(line.get("base_model") == "tiny" for line in lines)
    assert "secret" not in "".join(text)
