"""The Ray cluster that rollout workers run on: one of the job's own on this machine, or one that exists.

What the operator has to set for a cluster is told in docs/how-to/run-grpo-on-ray.md.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tinker_jobs.errors import JobFailedError
from tinker_jobs.grpo.groups import Asked, PromptGroup, PublishedPolicy
from tinker_jobs.grpo.guard import guard_children
from tinker_jobs.grpo.pool import RolloutWorkerLostError
from tinker_jobs.grpo.worker import RolloutWorker, WorkerSpec

OBJECT_STORE_BYTES = 128 * 2**20
"""Shared memory of a job's own Ray: completions are small."""
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


@contextlib.contextmanager
def local_ray(directory: Path, num_cpus: int) -> Iterator[None]:
    """A Ray of our own, whose files are in a directory; nothing of it is left after the block.

    Raises `JobFailedError` when it does not start.
    """
    files = directory / "ray"
    shutil.rmtree(files, ignore_errors=True)  # of a process that was killed
    files.mkdir(parents=True, mode=0o700)
    # The path of a socket must have less than 108 bytes, and Ray adds 60 to that of its directory.
    with _removed(files), tempfile.TemporaryDirectory(prefix="tinker-ray-") as short, guard_children(Path(short)):
        link = Path(short) / "r"
        link.symlink_to(files)
        _set_environment(files / "token")  # before Ray is imported, which looks at it once
        # An address of this machine only; 127.0.0.1 itself Ray would replace by that of a network interface.
        own = {"_node_ip_address": "127.0.0.2"} if sys.platform == "linux" else {}
        with _joined(
            "cannot start Ray on this machine",
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(link),
            **own,
        ):
            yield


@contextlib.contextmanager
def _removed(directory: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(directory)


def _set_environment(token: Path) -> None:
    """For this process and all of Ray's: whoever lacks the token is refused, for Ray listens on every interface."""
    descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would come before the file
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextlib.contextmanager
def existing_ray(address: str) -> Iterator[None]:
    """A cluster that is there already, of which this machine must be a node; it stays when the block is left.

    Raises `JobFailedError` when it cannot be joined.
    """
    if "://" in address:
        raise JobFailedError(f"--jobs-ray-address must be host:port of a cluster's head, got {address!r}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    what = f"cannot join the Ray cluster at {address} (with tokens: set RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH)"
    with _joined(what, address=address):
        yield


@contextlib.contextmanager
def _joined(what: str, **options: Any) -> Iterator[None]:  # noqa: ANN401 - those of ray.init
    ray = import_ray()
    try:
        try:
            ray.init(**QUIET, **options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise JobFailedError(f"{what}: {error}") from error
        yield
    finally:
        ray.shutdown()


def import_ray() -> Any:  # noqa: ANN401 - Ray need not be installed
    """Ray; raises `JobFailedError` where it is not installed."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise JobFailedError("backend ray needs Ray on this server: pip install 'tinker-jobs[ray]'") from error
    return ray


def check_reach(server_url: str) -> None:
    """Raise `JobFailedError` when rollout workers may be on machines that cannot reach the server by this URL."""
    ray = import_ray()
    own = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    if others and _is_loopback(urlsplit(server_url).hostname or ""):
        raise JobFailedError(
            f"the Ray cluster has {len(others)} nodes beside this machine, which do not reach the server at "
            f"{server_url}; start tinker-server with --host and --jobs-ray-server-url http://ADDRESS:PORT"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class RayWorkers:
    """Makes rollout workers on the cluster that this process has joined."""

    def __init__(self, spec: WorkerSpec, *, beside_learner: bool) -> None:
        """With ``beside_learner`` they run on this machine's node, else spread over all."""
        self._ray = import_ray()
        self._spec = self._ray.put(spec)
        self._options = self._placement(beside_learner)
        self._num_spawned = 0

    def spawn(self) -> RayWorker:
        """A new worker, which may have to wait for a node that has room for it."""
        self._num_spawned += 1
        # Not restarted by Ray: who replaces a worker has to know which prompts went with it.
        actor = self._ray.remote(RolloutWorker).options(max_restarts=0, **self._options).remote(self._spec)
        return RayWorker(actor, f"#{self._num_spawned}")

    def _placement(self, beside_learner: bool) -> dict[str, Any]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not beside_learner:
            return {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        own = self._ray.get_runtime_context().get_node_id()
        # They and the learner take turns, so that they need no CPU of their own.
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(own, soft=False)}


class RayWorker:
    """A rollout worker that is a Ray actor; see `tinker_jobs.grpo.pool.Worker`."""

    def __init__(self, actor: Any, name: str) -> None:  # noqa: ANN401 - Ray's handle
        self._ray = import_ray()
        self._actor = actor
        self._name = name

    @property
    def name(self) -> str:
        """Its number, and where it runs once that is known."""
        return self._name

    async def start(self) -> None:
        """See `Worker`."""
        where = await self._result(self._actor.start.remote())
        self._name = f"{self._name} on {where}"

    async def roll_out(self, asked: Asked, policy: PublishedPolicy) -> PromptGroup:
        """See `Worker`."""
        group: PromptGroup = await self._result(self._actor.roll_out.remote(asked, policy))
        return group

    def stop(self) -> None:
        """See `Worker`."""
        self._ray.kill(self._actor, no_restart=True)

    async def _result(self, reference: Any) -> Any:  # noqa: ANN401 - Ray's reference, and whatever it stands for
        try:
            return await reference
        except self._ray.exceptions.RayTaskError as error:
            # What the worker's own code raised; another worker would raise it too.
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            # An actor, a node or an object of theirs is gone, or cannot be reached. After a partition it may still be
            # there, but nobody waits for it any more.
            raise RolloutWorkerLostError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
