"""A real ``tinker-server`` with FSDP2 workers and a vLLM engine, and the processes that it consists of."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import httpx

from tests.chaos.tree import wait_gone
from tests.e2e.conftest import run_server
from tests.models import write_tiny_model
from tests.processes import children_of, ranks_of
from tests.vllm.conftest import HIDDEN_SIZE

ENGINE = "tinker_sampler_vllm.engine"
"""What the command line of an engine has."""
PATIENCE = 120.0
"""Seconds after which a test gives up waiting for a process to end."""


@attrs.frozen
class VllmServer:
    """A running server with one base model."""

    url: str
    base_model: str
    data_dir: Path
    handoff_dir: Path

    @property
    def supervisor(self) -> int:
        """The pid of the command."""
        [pid] = [pid for pid, words in children_of(os.getpid()).items() if str(self.data_dir) in words]
        return pid

    @property
    def process(self) -> int:
        """The pid of the server process."""
        [pid] = children_of(self.supervisor)
        return pid

    def ranks(self) -> list[int]:
        """Pids of the trainer's ranks."""
        return list(ranks_of(self.process))

    def engine(self) -> dict[str, int]:
        """Pids of the processes of the engine by what they are: ``main`` is the one that the sampler talks to."""
        [main] = [pid for pid, words in children_of(self.process).items() if ENGINE in words]
        found = {"main": main}
        for pid, words in _descendants(main):
            title = "".join(words)
            found |= {name: pid for name in ("EngineCore", "Worker") if f"VLLM::{name}" in title}
        assert len(found) == 3, f"an engine of {found}"
        return found

    def held(self) -> list[str]:
        """What the sampler keeps in memory: a directory for each revision."""
        return sorted(path.parent.name for path in self.handoff_dir.rglob("held/*/adapter_config.json"))

    def metric(self, name: str, **labels: str) -> float:
        """The present value of a metric."""
        text = httpx.get(f"{self.url}/metrics").text
        wanted = "".join(f'(?=[^}}]*{key}="{value}")' for key, value in labels.items())
        [value] = re.findall(rf"^{name}(?:{{{wanted}[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return float(value)


def _descendants(pid: int) -> Iterator[tuple[int, list[str]]]:
    for child, words in children_of(pid).items():
        yield child, words
        yield from _descendants(child)


def kill(pids: Iterable[int]) -> None:
    """End processes the hard way and wait until they are gone."""
    pids = list(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_gone(pids, PATIENCE) == []


@contextmanager
def run_vllm_server(directory: Path, *flags: str, name: str = "") -> Iterator[VllmServer]:
    """Serve a tiny model, under its path unless it is given a name; the hand-off has a directory of its own."""
    path = write_tiny_model(directory / "model", "llama", tie=True, hidden_size=HIDDEN_SIZE)
    handoff = directory / "handoff"
    handoff.mkdir()
    common = ["--backend", "fsdp", "--sampler", "vllm", "--vllm-kv-cache-mib", "64", "--max-lora-rank", "8"]
    base_model = f"{name}={path}" if name else str(path)
    where = ["--data-dir", str(directory / "data"), "--handoff-dir", str(handoff)]
    with run_server("--base-model", base_model, *common, *where, *flags) as url:
        yield VllmServer(url, name or str(path), directory / "data", handoff)
