"""A Ray cluster of two nodes on one machine, each in a network namespace of its own, joined by a cable to be cut."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

PORT = 6390
HEAD_IP, OTHER_IP = "10.213.77.1", "10.213.77.2"
# A partition is noticed after 15 seconds rather than after a minute, and a node that is only slow is let live.
HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}


@attrs.frozen
class Namespace:
    """A network namespace."""

    name: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """Of commands that run in it."""
        return ("ip", "netns", "exec", self.name)

    def run(self, *command: str) -> None:
        subprocess.run([*self.prefix, *command], check=True)


def may_make_namespaces() -> bool:
    """Whether this process may; that takes root and a kernel that lets it."""
    name = f"tj-probe-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
    if made:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made


@contextlib.contextmanager
def two_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces with one address each, which reach each other and nothing else."""
    here = os.getpid()
    names = [Namespace(f"tj-{here}-{letter}") for letter in "ab"]
    with contextlib.ExitStack() as stack:
        for one in names:
            subprocess.run(["ip", "netns", "add", one.name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", one.name], check=True)
        ends = [f"tj{here % 10**9}{letter}" for letter in "ab"]
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for one, end, address in zip(names, ends, (HEAD_IP, OTHER_IP), strict=True):
            subprocess.run(["ip", "link", "set", end, "netns", one.name, "name", "cable"], check=True)
            one.run("ip", "address", "add", f"{address}/24", "dev", "cable")
            one.run("ip", "link", "set", "cable", "up")
            one.run("ip", "link", "set", "lo", "up")
        yield names[0], names[1]


class RayNode:
    """``ray start --block``: a node with everything that belongs to it, in a process group."""

    def __init__(self, namespace: Namespace, *arguments: str, environment: Mapping[str, str]) -> None:
        self.namespace = namespace
        ray = str(Path(sys.executable).parent / "ray")
        self._process = subprocess.Popen(
            [*namespace.prefix, ray, "start", "--block", "--disable-usage-stats", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def wait_until_started(self) -> None:
        assert self._process.stdout is not None
        log = []
        for line in self._process.stdout:
            log.append(line)
            if "Ray runtime started" in line:
                return
        raise AssertionError("".join(log))

    def kill(self) -> None:
        """All of it at once, as when a machine loses power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=60)

    def close(self) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


@attrs.frozen
class Cluster:
    """A head, where the job's process runs too, and another node."""

    head: RayNode
    other: RayNode
    environment: Mapping[str, str]
    """What everything that joins needs."""

    @property
    def address(self) -> str:
        return f"{HEAD_IP}:{PORT}"

    def cut_cable(self) -> None:
        self.other.namespace.run("ip", "link", "set", "cable", "down")


@contextlib.contextmanager
def two_nodes(directory: Path, *, head_cpus: int, other_cpus: int) -> Iterator[Cluster]:
    """A cluster whose files are in a directory with a short path."""
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= HEALTH_CHECKS
    quiet = ("--include-dashboard=false", "--object-store-memory=134217728")
    with two_namespaces() as (first, second), contextlib.ExitStack() as stack:
        head = RayNode(
            first,
            "--head",
            f"--node-ip-address={HEAD_IP}",
            f"--port={PORT}",
            f"--num-cpus={head_cpus}",
            f"--temp-dir={directory}",
            *quiet,
            environment=environment,
        )
        stack.callback(head.close)
        head.wait_until_started()
        other = RayNode(
            second,
            f"--address={HEAD_IP}:{PORT}",
            f"--node-ip-address={OTHER_IP}",
            f"--num-cpus={other_cpus}",
            quiet[1],
            environment=environment,
        )
        stack.callback(other.close)
        other.wait_until_started()
        yield Cluster(head, other, environment)
