"""GRPO jobs on an existing cluster, one of whose nodes is lost. Needs root, for network namespaces."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs
import pytest

from tests.jobs.grpo_jobs import grpo_spec, make_task, outliving, ready_pid, trained_positions
from tests.jobs.rl_jobs import final_metrics, messages
from tests.jobs.workers import WorkerProcess
from tests.models import write_tiny_model
from tests.ray.nodes import HEAD_IP, Cluster, may_make_namespaces, two_nodes
from tinker_jobs.protocol import EventType, JobEvent, JobSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.skipif(not may_make_namespaces(), reason="this user may not make network namespaces"),
]

READY = re.compile(r"tinker-server ready on \S+:(\d+)")
ROWS = [{"prompt": f"What is {a} + 1?"} for a in range(24)]
CONFIG = {
    "num_rollouts": 16,
    "batch_size": 4,
    "num_rollout_workers": 2,
    "reward_recipe": {"name": "digits", "params": {}},
}
TASK = make_task(max_new_tokens=6, epochs=2, lora_rank=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("nodes") / "llama", "llama", tie=True))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    # A directory with a short path: Ray keeps sockets in it.
    with tempfile.TemporaryDirectory(prefix="tj-", ignore_cleanup_errors=True) as directory:
        with two_nodes(Path(directory), head_cpus=1, other_cpus=1) as cluster:
            for name, value in cluster.environment.items():
                monkeypatch.setenv(name, value)
            yield cluster
        assert outliving(directory) == {}


@attrs.frozen
class NodeServer:
    """A server beside the head that listens on all addresses, so that it has keys."""

    port: int
    key: str

    @property
    def url(self) -> str:
        """By which both nodes reach it."""
        return f"http://{HEAD_IP}:{self.port}"


@pytest.fixture
def server(cluster: Cluster, model: str, tmp_path: Path) -> Iterator[NodeServer]:
    program, data = str(Path(sys.executable).parent / "tinker-server"), ("--data-dir", str(tmp_path / "data"))
    made = subprocess.run(
        [program, "keys", "create", "--owner", "me", *data], capture_output=True, text=True, check=True
    )
    key = made.stdout.split()[0]
    flags = ("--host", "0.0.0.0", "--port", "0", "--base-model", model, *data)
    command = (*cluster.head.namespace.prefix, program, *flags)
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=log, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := READY.search(line):
                yield NodeServer(int(found.group(1)), key)
                break
        else:
            pytest.fail("".join(lines))
    finally:
        process.terminate()
        process.communicate(timeout=120)


def spec_of(
    cluster: Cluster,
    server: NodeServer,
    model: str,
    directory: Path,
    *,
    url: str | None = None,
    options: Mapping[str, str] | None = None,
    **config: object,
) -> JobSpec:
    found = {"jobs-ray-address": cluster.address, **(options or {})}
    chosen = {**CONFIG, **config}
    return grpo_spec(url or server.url, model, directory, ROWS, chosen, TASK, options=found, api_key=server.key)


def events_of(cluster: Cluster, spec: JobSpec, lose_node: Callable[[], None] = lambda: None) -> list[JobEvent]:
    """The events of a job that loses a node after the first step that both of its workers are there for."""
    events = []
    num_ready = 0
    with WorkerProcess(spec, cluster.head.namespace.prefix) as process:
        for event in process.events():
            events.append(event)
            num_ready += ready_pid(event) is not None
            if event.event_type is EventType.STEP_COMPLETE and num_ready == 2:
                lose_node()
                num_ready = 0
        assert process.process.wait(timeout=180) == 0
    return events


@pytest.mark.parametrize("mode", ["async", "distributed"])
@pytest.mark.parametrize("how", ["killed", "partitioned"])
def test_a_job_loses_no_step_when_a_node_is_lost(
    cluster: Cluster, server: NodeServer, model: str, tmp_path: Path, how: str, mode: str
) -> None:
    lose = cluster.other.kill if how == "killed" else cluster.cut_cable
    # So slow that the second worker comes and goes before the job is done.
    recipe = {"name": "slow_digits", "params": {"seconds": 0.2}}
    spec = spec_of(cluster, server, model, tmp_path / "job", execution_mode=mode, reward_recipe=recipe)
    events = events_of(cluster, spec, lose)
    metrics = final_metrics(events)
    assert metrics["steps"] == list(range(1, 13))
    assert trained_positions(events) == list(range(48))
    assert metrics["train/rollout_workers_lost"] >= 1
    assert any("go to others" in line for line in messages(events, "warning"))


def test_colocated_workers_stay_on_the_node_of_the_learner(
    cluster: Cluster, server: NodeServer, model: str, tmp_path: Path
) -> None:
    spec = spec_of(cluster, server, model, tmp_path / "job", execution_mode="colocated")
    events = events_of(cluster, spec, cluster.other.kill)
    assert final_metrics(events)["train/rollout_workers_lost"] == 0
    assert trained_positions(events) == list(range(48))


def test_a_server_that_other_nodes_do_not_reach_is_refused(
    cluster: Cluster, server: NodeServer, model: str, tmp_path: Path
) -> None:
    # What a server that listens everywhere calls itself towards its own jobs.
    url = f"http://127.0.0.1:{server.port}"
    (*_, failed) = events_of(cluster, spec_of(cluster, server, model, tmp_path / "job", url=url))
    assert failed.event_type is EventType.TRAINING_ERROR
    assert "do not reach the server at http://127.0.0.1" in str(failed.error)
    named = {"jobs-ray-server-url": server.url}
    events = events_of(cluster, spec_of(cluster, server, model, tmp_path / "again", url=url, options=named))
    assert trained_positions(events) == list(range(48))
